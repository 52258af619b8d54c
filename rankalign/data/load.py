"""Candidates from files of any known format, recognised by the keys of their first records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain

from rankalign.data.convert import Intake, load_each
from rankalign.data.formats.arrow import parts
from rankalign.data.records import CandidateSet
from rankalign.errors import InputError


def load(
    path: str | os.PathLike[str], format_name: str = "auto", intake: Intake | None = None, *more: str
) -> Iterator[CandidateSet]:
    """Records of a file: JSON Lines, a JSON list, Parquet or a folder of Hugging Face ``datasets``.

    Args:
        path: the file or folder.
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
    return chain.from_iterable(load_each([path, *more], format_name, intake or Intake(skip_invalid=False)))
