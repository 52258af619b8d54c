"""One format into another, through the record, with a count of everything that did not make it."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rankalign.data.formats import FORMATS, Format, Losses
from rankalign.data.formats.answers import AnswerFormat
from rankalign.data.formats.common import Dropped, RowFormat
from rankalign.data.formats.detect import detect
from rankalign.data.formats.layout import parse_columns
from rankalign.data.formats.named import DATASETS
from rankalign.data.formats.native import Native
from rankalign.data.formats.own import Own
from rankalign.data.formats.table import FORMAT, Table, checked_names
from rankalign.data.formats.unread import NOTHING, Ignored
from rankalign.data.mixing import Mixture, with_own_ids
from rankalign.data.overlap import NearDuplicates
from rankalign.data.quick import quick_record
from rankalign.data.records import CandidateSet
from rankalign.errors import InputError, RecordError
from rankalign.registry import did_you_mean
from rankalign.storage.code import is_code
from rankalign.storage.files import atomic_writer, is_remote
from rankalign.storage.folders import new_folder
from rankalign.storage.jsonl import OnError, Row, dumps, encode, loads, write_rows
from rankalign.storage.sources import Source, parts, rows_of
from rankalign.storage.spreadsheet import is_spreadsheet, read_cells, write_sheet
from rankalign.storage.tables import write_folder, write_parquet

EVERYTHING = Mixture()


class Intake:
    """Takes the errors of a reader: rows dropped by rule are counted, bad ones raise or, if so wished, are skipped.

    Args:
        skip_invalid: leave bad rows out and keep their errors, instead of raising the first.
        ignore_columns: names with commas between them, or ``all``: columns that may stay unread, see
            :mod:`rankalign.data.formats.unread`.
        columns: what each column of a table is, see :func:`rankalign.data.formats.layout.parse_columns`.

    Attributes:
        read: how many rows there were.
        errors: the bad rows' errors.
        losses: rows dropped by rule, by reason.
        unread: rows with a column that nothing was made of, by column; it waits in ``meta``.
        renamed: records that were given another id, because theirs was taken.
        notes: what was said of whole files, each with its file.
        quiet: keep the notes and say nothing, where a file is read again.
    """

    def __init__(self, skip_invalid: bool, ignore_columns: str = "", columns: str = "") -> None:
        self.skip_invalid, self.ignored = skip_invalid, Ignored.of(ignore_columns)
        self.of_table = checked_names(ignore_columns.split(","))
        self.layout = parse_columns(columns) if columns else None
        self.read, self.errors, self.losses, self.unread = 0, list[RecordError](), Losses(), Losses()
        self.renamed = 0
        self.notes, self.quiet = list[tuple[str, str]](), False

    def note(self, file: str, text: str) -> None:
        """Say something of a whole file on stderr, and keep it."""
        self.notes.append((file, text))
        if not self.quiet:
            print(f"{file}: {text}", file=sys.stderr)

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

    def watch(self, form: Format, records: Iterable[CandidateSet], file: str) -> Iterator[CandidateSet]:
        """``records`` as they pass, their unread columns counted, and said at the end."""
        found, before = Losses(), self.renamed
        for record in records:
            # A table refuses such columns itself.
            if isinstance(form, RowFormat | AnswerFormat) and not isinstance(form, Table):
                for column in form.unread(record):
                    found.add(column)
                    self.unread.add(column)
            if isinstance(form, RowFormat) and not isinstance(form, Table):
                self.renamed += form.own_id(record) not in (None, record.id)
            yield record
        if renamed := self.renamed - before:
            self.note(file, f"{renamed} ids stood there already; these records were named by their line")
        if found.counts:
            named = ", ".join(f"{column} ({count})" for column, count in found.counts.items())
            self.note(file, f"columns that are not read, with their rows (they stay in meta): {named}")

    def rename(self) -> None:
        """Count a record whose id another source had taken."""
        self.renamed += 1

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """``rows``, counted as they pass."""
        for row in rows:
            self.read += 1
            yield row


def find_format(name: str, judge: str = "", pairs: str = "all") -> Format:
    """The format ``name``, told which judge ranks and which pairs to write where it has a use for that."""
    if is_code(name):
        return Own(name)
    found: Format = FORMATS.load(name)
    return dataclasses.replace(found, judge=judge, pairs=pairs) if isinstance(found, RowFormat) else found


def find_reader(name: str, ignored: Ignored = NOTHING) -> Format:
    """The format ``name``, or what reads the published data set of that name; ``ignored`` columns stay unread.

    Raises:
        InputError: neither is known.
    """
    if not is_code(name) and name not in FORMATS and name not in DATASETS:
        raise InputError(f"unknown format {name!r}{did_you_mean(name, [*FORMATS, *DATASETS])}")
    found = DATASETS[name].open() if name in DATASETS else find_format(name)
    return dataclasses.replace(found, ignored=ignored) if isinstance(found, RowFormat) else found


def load(sources: Sequence[Source], from_format: str, intake: Intake) -> Iterator[CandidateSet]:
    """Records of a file in any format, or of several for the formats that keep prompts, answers and verdicts apart.

    Raises:
        InputError: the format reads one file at a time.
    """
    form = find_reader(from_format, intake.ignored)
    if isinstance(form, Table):
        form = dataclasses.replace(form, layout=intake.layout, ignore=intake.of_table)
    files = [(str(path), intake.count(_rows(form, path, intake.unreadable))) for path in sources]
    if len(files) == 1:
        return intake.watch(form, form.read(files[0][1], files[0][0], intake), files[0][0])
    if not isinstance(form, AnswerFormat):
        raise InputError(f"format {from_format!r} reads one file at a time, got {len(files)}")
    return intake.watch(form, form.read_files(files, intake), files[0][0])


def _rows(form: Format, path: Source, on_error: OnError) -> Iterator[Row]:
    """The cells of a spreadsheet as they stand for a table, which is told what they are; else what formats expect."""
    if isinstance(form, Table) and is_spreadsheet(path):
        return read_cells(path, on_error)
    return rows_of(path, on_error, quick_record if isinstance(form, Native) else None)


def load_each(
    sources: Sequence[Source], from_format: str, intake: Intake, extra: Sequence[Source] = ()
) -> list[Iterator[CandidateSet]]:
    """Records by source, no id twice; the splits of a saved ``DatasetDict`` are sources of their own.

    Files of one format that keeps prompts, answers and verdicts apart are one source together.

    Args:
        sources: files and folders.
        from_format: a name in ``rankalign ls formats``, or ``auto`` to tell it for each source.
        intake: takes bad rows and counts.
        extra: further files of the first source.
    """
    paths = [part for source in sources for part in parts(source)]
    if intake.layout and from_format not in ("auto", FORMAT.name):
        raise InputError(f"columns are named for format {FORMAT.name!r}, and not for {from_format!r}")
    told = FORMAT.name if intake.layout else from_format
    names = [detect(path) if told == "auto" else told for path in paths]
    if extra or (len(set(names)) == 1 and isinstance(find_reader(names[0]), AnswerFormat)):
        return [load([*paths, *extra], names[0], intake)]
    return with_own_ids(
        [(path, load([path], name, intake)) for path, name in zip(paths, names, strict=True)], intake.rename
    )


def convert(
    source: Source | Sequence[Source],
    target: Source,
    from_format: str = "auto",
    to_format: str = "rankalign",
    skip_invalid: bool = False,
    judge: str = "",
    pairs: str = "all",
    extra: Sequence[Source] = (),
    mixture: Mixture = EVERYTHING,
    ignore_columns: str = "",
    columns: str = "",
    dedup: float = 0.0,
    output_shards: int = 0,
) -> dict[str, Any]:
    """Rewrite one source or several as ``target``; nothing is written where it fails.

    Args:
        source: JSON Lines or one JSON list, gzip or not; Parquet; CSV, TSV or XLSX; a folder of Hugging Face
            ``datasets``. Or several.
        target: JSON Lines; one JSON list where the name ends in ``.json`` (for ``rrhf`` lines in any case); Parquet
            where it ends in ``.parquet``; CSV, TSV or XLSX where it ends so, records as a row an answer; a ``datasets``
            folder where it has no ending or ends with a slash.
        from_format: a name in ``rankalign ls formats``, or ``auto`` to tell it by the keys of the first row.
        to_format: a name in ``FORMATS``.
        skip_invalid: leave bad rows out and report them, instead of stopping at the first.
        judge: whose scores rank, where the target ranks and the records have several judges.
        pairs: ``all`` strict pairs of a ranked list, or ``best-worst``.
        extra: further files that belong to ``source``, such as the questions to FastChat's answers or the preferences
            to AlpacaEval's outputs.
        mixture: what to take of each source, and what to hold out: into ``NAME.test.ENDING`` beside the target, or as
            the split ``test`` of a folder.
        ignore_columns: columns that may stay unread, or ``all``; without it a row without any score that has a column
            nobody reads is a bad row.
        columns: what each column is, see :func:`rankalign.data.formats.layout.parse_columns`.
        dedup: leave out records whose prompt shares so much of its runs of words with an earlier one that is kept, see
            :class:`rankalign.data.overlap.NearDuplicates`; they are counted as ``lost``. 0 keeps all.
        output_shards: make of the target a folder of that name with so many files of that kind, in which the rows stand
            in their order; 0 writes one file.

    Returns:
        ``read`` and ``written`` (rows; with a test part its rows are counted as ``written_test``), ``skipped`` (bad
        rows), ``errors`` (one entry a bad row), ``lost``: what sound rows held and the target does not, by field
        or reason; and where there are any, ``unread``: rows by column that nothing was made of, and ``renamed_ids``:
        how many ids stood twice and were replaced.

    Raises:
        RecordError: a bad row, unless ``skip_invalid``.
        InputError: unknown format or judge, unreadable file.
    """
    if to_format == "rankalign" and is_spreadsheet(target):
        to_format = FORMAT.name  # a record is no row of cells
    intake, writer = Intake(skip_invalid, ignore_columns, columns), find_format(to_format, judge, pairs)
    sources = [source] if isinstance(source, str | os.PathLike) else source
    records = mixture.take(load_each(sources, from_format, intake, extra), intake.losses)
    if dedup:
        records = _distinct(records, NearDuplicates(dedup), intake.losses)
    sides = [records] if not mixture.test_size else list(mixture.split(records))
    rows = [writer.write(side, intake.losses) for side in sides]
    if output_shards < 0 or (output_shards and _is_folder(target) and not Path(target).suffix):
        raise InputError(f"{target}: shards are files: name an ending, such as .jsonl, and a number of them from 1 on")
    counts = write_any(
        target, rows, lines=to_format == "rrhf", shards=output_shards
    )  # RRHF's own loader reads lines from .json files
    return {
        "read": intake.read,
        **dict(zip(("written", "written_test"), counts, strict=False)),
        "skipped": len(intake.errors),
        "errors": [error.as_dict() for error in intake.errors],
        "lost": intake.losses.counts,
        **({"unread": intake.unread.counts} if intake.unread.counts else {}),
        **({"renamed_ids": intake.renamed} if intake.renamed else {}),
    }


def _distinct(records: Iterable[CandidateSet], near: NearDuplicates, losses: Losses) -> Iterator[CandidateSet]:
    for record in near.without(records):
        if record is None:
            losses.add("near-duplicates of an earlier prompt")
        else:
            yield record


def write_any(
    target: Source, sides: Sequence[Iterable[dict[str, Any]]], lines: bool = False, shards: int = 0
) -> list[int]:
    """Write rows, or the rows of a training and a test part, in the way that the target's name asks for.

    Args:
        target: see :func:`convert`.
        sides: the rows, by part.
        lines: whether ``.json`` means lines, too.
        shards: how many files, in a folder of the target's name; 0 for the one file.

    Returns:
        How many rows, by part.
    """
    if is_remote(target):
        if len(sides) > 1 or shards or not Path(target).suffix:
            raise InputError(f"{target}: one file can be written to an address, and a folder or a test part only here")
        return [_write(target, sides[0], lines)]
    if _is_folder(target) and not shards:
        names = [""] if len(sides) == 1 else ["train", "test"]
        return list(write_folder(target, dict(zip(names, sides, strict=True))).values())
    path = Path(target)
    head, dot, ending = path.name.partition(".")
    paths = [path, path.with_name(f"{head}.test{dot}{ending}")]
    if shards:
        return [_write_shards(path, rows, lines, shards) for path, rows in zip(paths, sides, strict=False)]
    return [_write(path, rows, lines) for path, rows in zip(paths, sides, strict=False)]


def _write_shards(target: Path, rows: Iterable[dict[str, Any]], lines: bool, shards: int) -> int:
    """Write a folder of files whose rows, in the order of their names, are the rows; return how many."""
    ending = "".join(target.suffixes[-2:] if target.suffix == ".gz" else target.suffixes[-1:])
    with new_folder(target) as fresh, tempfile.TemporaryFile() as kept:
        # How many rows a file gets is known when all are there.
        count = 0
        for row in rows:
            kept.write(encode(row) + b"\n")
            count += 1
        kept.seek(0)
        for shard in range(shards):
            own = count * (shard + 1) // shards - count * shard // shards
            part = (dict(loads(line.decode("utf-8"))) for line in islice(kept, own))
            _write(fresh / f"part-{shard:05d}-of-{shards:05d}{ending}", part, lines)
    return count


def _is_folder(target: Source) -> bool:
    """A name with a slash at its end or without an ending; what is there and no folder (a pipe) is none."""
    path = Path(target)
    return str(target).endswith(os.sep) or path.is_dir() or (not path.suffix and not path.exists())


def _write(target: Source, rows: Iterable[dict[str, Any]], lines: bool) -> int:
    path = Path(target)
    if path.suffix == ".parquet":
        return write_parquet(target, rows)
    if is_spreadsheet(path):
        return write_sheet(path, rows)
    return (
        _write_list(target, rows)
        if path.name.removesuffix(".gz").endswith(".json") and not lines
        else write_rows(target, rows)
    )


def _write_list(path: Source, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON list, an element a line; return how many."""
    count = 0
    with atomic_writer(path) as out:
        for row in rows:
            out.write((",\n" if count else "[\n").encode() + dumps(row).encode("utf-8"))
            count += 1
        out.write(b"\n]\n" if count else b"[]\n")
    return count
