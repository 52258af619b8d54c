"""CSV and TSV files as rows of cells, and rows as such files that no spreadsheet program takes for formulas."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from rankalign.errors import InputError, RecordError
from rankalign.storage.files import GZIP_MAGIC, atomic_writer, decode
from rankalign.storage.jsonl import OnError, dumps

GUARDED = "guarded"
"""The column that names a row's columns whose text was given an apostrophe in front."""

# What Excel, LibreOffice and Google Sheets begin a formula with, full-width forms included, behind blanks or not; a tab
# or line end in front makes some of them split the cell first.
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
Cells = tuple[int, list[Any]]


def csv_rows(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Cells]:
    """Yield ``(line on which a row begins, its cells)``, the first row being the header; bad ones go to ``on_error``.

    Raises:
        InputError: the file is no text, or a quote never closes.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than some answers have
    bad: set[int] = set()
    with _open(path) as stream:
        lines = _lines(path, stream, bad, on_error)
        first = next(lines, "")
        delimiter = _delimiter(path, first)
        skip = first.lower().startswith("sep=")  # Excel's own way to say which character separates cells
        # Else csv takes what follows a closing quote into the cell, and the end of the file for a missing quote.
        reader = csv.reader((line for part in ([] if skip else [first], lines) for line in part), delimiter=delimiter,
                            strict=True)  # fmt: skip
        end = offset = int(skip)
        while True:
            start = end + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                end = reader.line_num + offset
                if "unexpected end" in str(error):  # csv.Error has no kinds, only texts
                    raise InputError(f"{path}:{start}: a quote opens in this row and never closes") from None
                on_error(RecordError(str(path), start, "", f"not valid CSV: {error}"))
                continue
            if cells is None:
                return
            end = reader.line_num + offset
            if any(cells) and not bad & set(range(start, end + 1)):
                yield start, cells


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    stream: Any = open(path, "rb")  # noqa: SIM115  (closed by the caller)
    head = stream.read(4)
    stream.seek(0)
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):  # zip, as .xlsx is; OLE, as .xls is
        stream.close()
        raise InputError(f"{path}: is a workbook and no text; name it .xlsx, or save it as CSV UTF-8")
    return gzip.open(stream) if head.startswith(GZIP_MAGIC) else stream  # type: ignore[return-value]


def _lines(path: str | os.PathLike[str], stream: IO[bytes], bad: set[int], on_error: OnError) -> Iterator[str]:
    """Lines with their ends, so that those inside quotes stay; the numbers of undecodable ones go into ``bad``."""
    for number, raw in enumerate(_bytes_of(stream), start=1):
        try:
            yield decode(path, number, raw)
        except RecordError as error:
            bad.add(number)
            advice = f"{error.reason}; save it as `CSV UTF-8`, or name the encoding's own program to convert it"
            on_error(RecordError(error.file, error.line, "", advice))
            # The reader still needs the line: a quoted cell may go on in it. Its row is left out by its number.
            yield raw.decode("utf-8", "replace")


def _bytes_of(stream: IO[bytes]) -> Iterator[bytes]:
    """UTF-8 lines; a byte-order mark is dropped, and what Excel calls Unicode text (UTF-16 with its mark) converted."""
    first = next(iter(stream.readline, b""), b"")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        stream.seek(0)
        # Half of a surrogate pair becomes bytes that are not UTF-8, and its line is refused by number like any other.
        for line in io.TextIOWrapper(stream, "utf-16", errors="surrogatepass", newline=""):
            yield line.encode("utf-8", "surrogatepass")
        return
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from stream


def _delimiter(path: str | os.PathLike[str], header: str) -> str:
    """Tab for .tsv; for .csv whichever of comma, semicolon and tab the first line has most of, outside quotes."""
    if "\0" in header:
        raise InputError(f"{path}: holds zero bytes: UTF-16 without its mark, or no text; save it as `CSV UTF-8`")
    if header.lower().startswith("sep="):
        return header[4:5]
    if str(path).lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    bare = re.sub(r'"[^"]*"', "", header)
    return max(",;\t", key=bare.count)


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as CSV, or as TSV where the name says so, atomically; return how many.

    Lists and objects become JSON, truth values ``true`` and ``false``; None is an empty cell. A text that a spreadsheet
    program would run as a formula (``=HYPERLINK(...)``, ``-1+1``, ``@SUM``) gets an apostrophe in front, and the row's
    cell in the column ``guarded`` names the columns that have one, by which reading takes it off again.

    Raises:
        InputError: it cannot be written, or a column's own name would be taken for a formula.
    """
    tabs = str(path).lower().removesuffix(".gz").endswith(".tsv")
    with Spool(_guard(row) for row in rows) as spool, atomic_writer(path) as out:
        if wrong := next((name for name in spool.names if FORMULA.match(name)), None):
            raise InputError(f"{path}: a spreadsheet would take the column name {wrong!r} for a formula; write .jsonl")
        text = io.TextIOWrapper(out, "utf-8", newline="", write_through=True)
        writer = csv.writer(text, delimiter="\t" if tabs else ",")  # CRLF, as RFC 4180 has it
        writer.writerow(spool.names)
        writer.writerows([_plain(row.get(name)) for name in spool.names] for row in spool)
        # A wrapper that is collected closes what it wraps, which atomic_writer has yet to sync.
        text.detach()
    return spool.count


def _guard(row: Mapping[str, Any]) -> dict[str, Any]:
    if GUARDED in row:
        raise InputError(f"a column is called {GUARDED!r}, which CSV files of ours need; rename it, or write .xlsx")
    hostile = [name for name, value in row.items() if isinstance(value, str) and FORMULA.match(value)]
    guarded = {name: f"'{value}" if name in hostile else value for name, value in row.items()}
    return {**guarded, GUARDED: dumps(hostile)} if hostile else guarded


def _plain(value: Any) -> str | int | float:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return dumps(value) if isinstance(value, list | dict) else value


class Spool:
    """Rows kept aside, in memory or on disk, until the names of all columns are known."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.names: list[str] = []
        self.count = 0
        # 64 MiB stay in memory, more goes to disk.
        self._kept: IO[bytes] = tempfile.SpooledTemporaryFile(1 << 26)  # noqa: SIM115  (closed by __exit__)
        seen: dict[str, None] = {}
        for row in rows:
            seen |= dict.fromkeys(row)
            self._kept.write(dumps(dict(row)).encode("utf-8") + b"\n")
            self.count += 1
        last = [GUARDED] if GUARDED in seen else []
        self.names = [name for name in seen if name != GUARDED] + last

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._kept.seek(0)
        return map(json.loads, self._kept)
