"""Candidates from files of any known format, recognised by the keys of their first records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain

from rankalign.data.convert import Intake, load_each
from rankalign.data.records import UNUSED, CandidateSet, Checker, refusal, unused
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import OnError
from rankalign.storage.sources import parts


def load(
    path: str | os.PathLike[str], format_name: str = "auto", intake: Intake | None = None, *more: str
) -> Iterator[CandidateSet]:
    """Records of whatever :mod:`rankalign.storage.sources` opens: lines, lists, tables, ``datasets`` folders, shards.

    Args:
        path: the file, folder or pattern.
        format_name: a name in ``rankalign ls formats``, or ``auto``.
        intake: takes bad rows and counts; without one the first bad row raises.
        more: further files, such as the questions to FastChat's answers.

    Raises:
        InputError: the format cannot be told, or the folder holds several splits: a test split is not to be trained on
            by accident.
        RecordError: a bad row.
    """
    if len(splits := parts(path)) > 1:
        raise InputError(f"{path}: holds several splits; name one: {', '.join(splits)}")
    intake = intake or Intake(skip_invalid=False)
    return used_whole(chain.from_iterable(load_each([path, *more], format_name, intake)), intake)


def used_whole(sets: Iterable[CandidateSet], on_error: OnError) -> Iterator[CandidateSet]:
    """The records all of which can reach a model; the others go to ``on_error``.

    ``convert`` carries images and the like from file to file; every other stage would drop them (see
    :func:`rankalign.data.records.unused`).
    """
    for record in sets:
        try:
            Checker(*(record.origin or ("<memory>", 0))).columns(record.meta)
            if fields := unused(record):
                raise refusal(record, fields[0], UNUSED)
        except RecordError as error:
            on_error(error)
        else:
            yield record
