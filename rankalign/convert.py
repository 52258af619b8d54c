"""One format into another, through the record, with a count of everything that did not make it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rankalign.errors import InputError, RecordError
from rankalign.files import atomic_writer
from rankalign.formats import FORMATS, Format, Losses
from rankalign.formats.answers import AnswerFormat
from rankalign.formats.common import Dropped, RowFormat
from rankalign.records import CandidateSet, Row, dumps, read_rows, write_rows


class Intake:
    """Takes the errors of a reader: rows dropped by rule are counted, bad ones raise or, if so wished, are skipped."""

    def __init__(self, skip_invalid: bool) -> None:
        self.skip_invalid = skip_invalid
        self.read, self.errors, self.losses = 0, list[RecordError](), Losses()

    def __call__(self, error: RecordError) -> None:
        """Take one error."""
        if isinstance(error, Dropped):
            self.losses.add(error.reason)
        elif self.skip_invalid:
            self.errors.append(error)
        else:
            raise error

    def unreadable(self, error: RecordError) -> None:
        """Take an error of a line that is no row at all."""
        self.read += 1
        self(error)

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """``rows``, counted as they pass."""
        for row in rows:
            self.read += 1
            yield row


def find_format(name: str, judge: str = "", pairs: str = "all") -> Format:
    """The format ``name``, told which judge ranks and which pairs to write where it has a use for that."""
    found: Format = FORMATS.load(name)
    return dataclasses.replace(found, judge=judge, pairs=pairs) if isinstance(found, RowFormat) else found


def load(sources: Sequence[str | os.PathLike[str]], from_format: str, intake: Intake) -> Iterator[CandidateSet]:
    """Records of a file in any format, or of several for the formats that keep prompts, answers and verdicts apart.

    Raises:
        InputError: the format reads one file at a time.
    """
    form = find_format(from_format)
    files = [(str(path), intake.count(read_rows(path, intake.unreadable))) for path in sources]
    if len(files) == 1:
        return form.read(files[0][1], files[0][0], intake)
    if not isinstance(form, AnswerFormat):
        raise InputError(f"format {from_format!r} reads one file at a time, got {len(files)}")
    return form.read_files(files, intake)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    from_format: str,
    to_format: str,
    skip_invalid: bool = False,
    judge: str = "",
    pairs: str = "all",
    extra: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Any]:
    """Rewrite ``source`` as ``target``; nothing is written where it fails.

    Args:
        source: JSON Lines or one JSON list, gzip or not.
        target: JSON Lines; one JSON list where the name ends in ``.json`` (for ``rrhf`` lines in any case).
        from_format: a name in ``FORMATS``.
        to_format: a name in ``FORMATS``.
        skip_invalid: leave bad rows out and report them, instead of stopping at the first.
        judge: whose scores rank, where the target ranks and the records have several judges.
        pairs: ``all`` strict pairs of a ranked list, or ``best-worst``.
        extra: further files that belong to ``source``, such as the questions to FastChat's answers or the preferences
            to AlpacaEval's outputs.

    Returns:
        ``read`` and ``written`` (rows), ``skipped`` (bad rows), ``errors`` (one entry a bad row), and ``lost``: what
        sound rows held and the target does not, by field or reason.

    Raises:
        RecordError: a bad row, unless ``skip_invalid``.
        InputError: unknown format or judge, unreadable file.
    """
    intake, writer = Intake(skip_invalid), find_format(to_format, judge, pairs)
    rows = writer.write(load((source, *extra), from_format, intake), intake.losses)
    written = _write_list(target, rows) if _wants_list(target, to_format) else write_rows(target, rows)
    return {
        "read": intake.read,
        "written": written,
        "skipped": len(intake.errors),
        "errors": [error.as_dict() for error in intake.errors],
        "lost": intake.losses.counts,
    }


def _wants_list(target: str | os.PathLike[str], to_format: str) -> bool:
    return to_format != "rrhf" and str(target).removesuffix(".gz").endswith(".json")


def _write_list(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON list, an element a line; return how many."""
    count = 0
    with atomic_writer(path) as out:
        for row in rows:
            out.write((",\n" if count else "[\n").encode() + dumps(row).encode("utf-8"))
            count += 1
        out.write(b"\n]\n" if count else b"[]\n")
    return count
