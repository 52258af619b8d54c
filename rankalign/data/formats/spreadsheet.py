"""Spreadsheets: CSV, TSV and XLSX, both ways, a row at a time.

An empty cell is a column that the row does not have. A row that has more or fewer cells than there are columns, bytes
that are not UTF-8 and a quote that never closes are errors, not guesses. Texts that a spreadsheet program would take
for formulas are written so that it does not (see :func:`write_csv`), and come back as they were.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import IO, Any

from rankalign.errors import InputError, RecordError, missing_extra
from rankalign.storage.files import GZIP_MAGIC, atomic_writer, decode
from rankalign.storage.jsonl import OnError, Row, dumps, loads

GUARDED = "guarded"
"""The column that names a row's columns whose text was given an apostrophe in front."""

# What Excel, LibreOffice and Google Sheets begin a formula with, full-width forms included, behind blanks or not; a tab
# or line end in front makes some of them split the cell first.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
# Columns of the formats we know that hold numbers, truth values or lists; a cell of any other column is a text.
_NUMERIC = re.compile(r"(?:.*_)?(?:scores?|labels?|rating|rewards?|margin|preference|rank|votes|chosen_score)(?:_\w+)?")
_NESTED = {"responses", "scores", "completions", "conversations", "messages", "context", "prefix", "suffix", "reward"}
_NESTED |= {"text", "score", "models", "annotations", "candidates", "tools", "responses_and_scores"}
_ESCAPE = re.compile("_(?=x[0-9A-Fa-f]{4})|[\x00-\x08\x0b-\x1f\ufffe\uffff]")
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
_MOST_ROWS, _MOST_CHARACTERS = 1_048_576, 32_767  # of an XLSX sheet, of a cell in it
_EXACT = 2**53  # the largest whole number up to which a float, and so Excel, holds every digit
Cells = tuple[int, list[Any]]


def is_spreadsheet(path: str | os.PathLike[str]) -> bool:
    """Whether a name ends in .csv, .tsv (gzip or not) or .xlsx."""
    name = str(path).lower()
    return name.removesuffix(".gz").endswith((".csv", ".tsv")) or name.endswith(".xlsx")


# --- reading -----------------------------------------------------------------------------------------------------


def read_sheet(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Row]:
    """Rows as the formats of other tools take them: texts, and numbers and lists in the columns that hold such."""
    for line, row in read_cells(path, on_error):
        yield line, {name: _typed(name, value) for name, value in row.items() if value is not None}


def read_cells(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Row]:
    """Yield ``(line or row number, cells by column)``; texts of CSV, what XLSX says they are, None where one is empty.

    Raises:
        InputError: the file is missing, damaged or empty, or two columns have one name.
    """
    rows = _rows(path, on_error)
    names = _header(path, rows)
    for number, cells in rows:
        try:
            row = _named(path, number, names, cells)
            row = _unguarded(path, number, row) if row.get(GUARDED) else row
            yield number, {name: cell for name, cell in row.items() if name != GUARDED or cell is not None}
        except RecordError as error:
            on_error(error)


def columns_of(path: str | os.PathLike[str]) -> list[str]:
    """Names of the columns."""
    return [name for name in _header(path, _rows(path, lambda error: None)) if name]


def _rows(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Cells]:
    try:
        yield from (_xlsx_rows if str(path).lower().endswith(".xlsx") else _csv_rows)(path, on_error)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _header(path: str | os.PathLike[str], rows: Iterator[Cells]) -> list[str]:
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: the file is empty")
    names = ["" if cell is None else str(cell).strip() for cell in first[1]]
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(f"{path}:{first[0]}: two columns are called {name!r}; rename one")
    return names


def _named(path: str | os.PathLike[str], number: int, names: list[str], cells: list[Any]) -> dict[str, Any]:
    """The cells by column, None where one holds nothing."""
    beyond = [cell for cell in cells[len(names) :] if cell not in (None, "")]
    if beyond or len(cells) < len(names):
        found = f"{len(cells)} cells for {len(names)} columns"
        raise RecordError(str(path), number, "", f"{found}; is a comma or a quote inside a cell not quoted?")
    found_here = {name: None if cell == "" else cell for name, cell in zip(names, cells, strict=False)}
    if any(cell not in (None, "") and not name for name, cell in zip(names, cells, strict=False)):
        raise RecordError(str(path), number, f"column {names.index('') + 1}", "has no name in the first row")
    return {name: cell for name, cell in found_here.items() if name}


def _unguarded(path: str | os.PathLike[str], number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row without the apostrophes that :func:`write_csv` put in front of texts."""
    try:
        names = loads(str(row[GUARDED]))
        if isinstance(names, list) and all(str(row[name]).startswith("'") for name in names):
            return {name: str(v)[1:] if name in names else v for name, v in row.items()} | {GUARDED: None}
    except (ValueError, KeyError, TypeError):
        pass
    reason = "must list the columns of this row whose text has an apostrophe in front, as a JSON list"
    raise RecordError(str(path), number, GUARDED, reason)


def text_of(cell: Any) -> str:
    """A cell as text: a whole number without decimals, as Excel shows it, though it stores 3.0."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer() and abs(cell) <= _EXACT:
        return str(int(cell))
    return cell.isoformat() if isinstance(cell, date | time) else str(cell)


def number_of(text: str) -> int | float | None:
    """A number from its usual spelling, or None: a decimal comma or a thousands separator is none."""
    if not _NUMBER.fullmatch(text):
        return None
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _typed(name: str, cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell if _NUMERIC.fullmatch(name.lower()) and isinstance(cell, bool | int | float) else text_of(cell)
    text = cell.strip()
    if text[:1] in ("[", "{"):
        try:
            value = loads(text)
        except ValueError:
            return cell
        return value if name in _NESTED or _are_messages(value) else cell
    if _NUMERIC.fullmatch(name.lower()):
        number = number_of(text)
        return {"true": True, "false": False}.get(text.lower(), cell if number is None else number)
    return cell


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


# --- CSV and TSV -------------------------------------------------------------------------------------------------


def _csv_rows(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Cells]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than some answers have
    bad: set[int] = set()
    with _open(path) as stream:
        lines = _lines(path, stream, bad, on_error)
        first = next(lines, "")
        delimiter = _delimiter(path, first)
        skip = first.lower().startswith("sep=")  # Excel's own way to say which character separates cells
        reader = csv.reader((line for part in ([] if skip else [first], lines) for line in part), delimiter=delimiter,
                            strict=True)  # fmt: skip
        end = offset = int(skip)
        while True:
            start = end + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                end = reader.line_num + offset
                if "unexpected end" in str(error):
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
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
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
            yield raw.decode("utf-8", "replace")


def _bytes_of(stream: IO[bytes]) -> Iterator[bytes]:
    """UTF-8 lines; a byte-order mark is dropped, and what Excel calls Unicode text (UTF-16 with its mark) converted."""
    first = next(iter(stream.readline, b""), b"")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        stream.seek(0)
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
    with _Spool(_guard(row) for row in rows) as spool, atomic_writer(path) as out:
        if wrong := next((name for name in spool.names if _FORMULA.match(name)), None):
            raise InputError(f"{path}: a spreadsheet would take the column name {wrong!r} for a formula; write .jsonl")
        text = io.TextIOWrapper(out, "utf-8", newline="", write_through=True)
        writer = csv.writer(text, delimiter="\t" if tabs else ",")  # CRLF, as RFC 4180 has it
        writer.writerow(spool.names)
        writer.writerows([_plain(row.get(name)) for name in spool.names] for row in spool)
        text.detach()
    return spool.count


def _guard(row: Mapping[str, Any]) -> dict[str, Any]:
    if GUARDED in row:
        raise InputError(f"a column is called {GUARDED!r}, which CSV files of ours need; rename it, or write .xlsx")
    hostile = [name for name, value in row.items() if isinstance(value, str) and _FORMULA.match(value)]
    guarded = {name: f"'{value}" if name in hostile else value for name, value in row.items()}
    return {**guarded, GUARDED: dumps(hostile)} if hostile else guarded


def _plain(value: Any) -> str | int | float:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return dumps(value) if isinstance(value, list | dict) else value


class _Spool:
    """Rows kept aside, in memory or on disk, until the names of all columns are known."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.names: list[str] = []
        self.count = 0
        self._kept: IO[bytes] = tempfile.SpooledTemporaryFile(1 << 26)  # noqa: SIM115  (closed by __exit__)
        seen: dict[str, None] = {}
        for row in rows:
            seen |= dict.fromkeys(row)
            self._kept.write(dumps(dict(row)).encode("utf-8") + b"\n")
            self.count += 1
        last = [GUARDED] if GUARDED in seen else []
        self.names = [name for name in seen if name != GUARDED] + last

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._kept.seek(0)
        return map(json.loads, self._kept)


# --- XLSX --------------------------------------------------------------------------------------------------------


def need_openpyxl(path: str | os.PathLike[str]) -> Any:
    """The package behind .xlsx.

    Raises:
        InputError: it is not installed; the message says what to install.
    """
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise missing_extra(f"{path}: an .xlsx file", "tables") from error
    return openpyxl


def _xlsx_rows(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Cells]:
    """Rows of the only sheet that holds any. Formulas are read as the value that was stored with them."""
    openpyxl = need_openpyxl(path)
    try:
        books = [openpyxl.load_workbook(path, read_only=True, data_only=stored) for stored in (False, True)]
    except FileNotFoundError:
        raise
    except Exception as error:  # openpyxl lets through whatever its XML, zip and style readers raise
        raise InputError(f"{path}: is no workbook that can be read: {error}") from None
    try:
        name, width = _only_sheet(path, books[0]), 0
        books[1][name].reset_dimensions()
        for number, pair in enumerate(zip(*(book[name].iter_rows() for book in books), strict=True), start=1):
            try:
                cells = [_value(path, number, *both) for both in zip(*pair, strict=True)]
            except RecordError as error:
                on_error(error)
            else:
                while cells and cells[-1] is None:
                    cells.pop()
                width = width or len(cells)  # that of the first row, which names the columns
                if cells:
                    yield number, cells + [None] * (width - len(cells))
    finally:
        for book in books:
            book.close()


def _only_sheet(path: str | os.PathLike[str], book: Any) -> str:
    full = []
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # what a file says of its size is often wrong, and would hide the rest
        if any(cell.value is not None for row in sheet.iter_rows() for cell in row):
            full.append(sheet.title)
    if len(full) > 1:
        raise InputError(f"{path}: several sheets hold something ({', '.join(full)}); keep one, or save it as CSV")
    if not full:
        raise InputError(f"{path}: the file is empty")
    return str(full[0])


def _value(path: str | os.PathLike[str], number: int, cell: Any, stored: Any) -> Any:
    if cell.value is None:
        return None
    if cell.data_type == "e" or stored.data_type == "e":
        raise RecordError(str(path), number, str(cell.coordinate), f"holds the error {stored.value or cell.value}")
    if cell.data_type == "f" and stored.value is None:
        reason = "holds a formula without a stored value; open and save the file in a spreadsheet program"
        raise RecordError(str(path), number, str(cell.coordinate), reason)
    if isinstance(stored.value, float) and stored.value.is_integer() and abs(stored.value) > _EXACT:
        reason = "is a number of so many digits that the last are lost; format the column as text and enter it anew"
        raise RecordError(str(path), number, str(cell.coordinate), reason)
    value = stored.value
    return _ESCAPED.sub(lambda code: chr(int(code[1], 16)), value) if isinstance(value, str) else value


def write_xlsx(path: str | os.PathLike[str], sheets: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, int]:
    """Write rows by sheet as one workbook, atomically; return how many by sheet.

    Every text is stored as text, whatever it begins with, so that none is run as a formula.

    Raises:
        InputError: openpyxl is missing, a text or a sheet is longer than the format allows, or it cannot be written.
    """
    openpyxl = need_openpyxl(path)
    with contextlib.ExitStack() as stack:
        # All texts are seen before the workbook is begun: one that is given up half-way leaves its files behind.
        spools = {name: stack.enter_context(_Spool(_fitting(path, rows))) for name, rows in sheets.items()}
        book = openpyxl.Workbook(write_only=True)
        for name, spool in spools.items():
            if spool.count >= _MOST_ROWS:
                raise InputError(f"{path}: {spool.count} rows, where .xlsx holds {_MOST_ROWS - 1}; write .csv")
            sheet = book.create_sheet(name)
            for row in itertools.chain([dict(zip(spool.names, spool.names, strict=True))], spool):
                sheet.append([_xlsx_cell(sheet, row.get(name)) for name in spool.names])
        with atomic_writer(path) as out:
            book.save(out)
    return {name: spool.count for name, spool in spools.items()}


def _fitting(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as numbers, truth values and escaped texts."""
    for row in rows:
        cells = {name: _escaped(value) for name, value in row.items()}
        for text in (*cells, *cells.values()):
            if isinstance(text, str) and len(text) > _MOST_CHARACTERS:
                most = f"{len(text)} characters, where .xlsx holds {_MOST_CHARACTERS}"
                raise InputError(f"{path}: a text has {most}; write .csv")
        yield cells


def _escaped(value: Any) -> Any:
    if value is None or (isinstance(value, bool | int | float) and abs(value) <= _EXACT):
        return value
    text = value if isinstance(value, str) else dumps(value)
    return _ESCAPE.sub(lambda found: f"_x{ord(found[0]):04X}_", text)


def _xlsx_cell(sheet: Any, value: Any) -> Any:
    """A cell; texts are marked as such, whatever they begin with."""
    if not isinstance(value, str | float):
        return value
    from openpyxl.cell import WriteOnlyCell

    cell = WriteOnlyCell(sheet, value)
    if isinstance(value, float):
        cell._value = repr(value)  # openpyxl writes 16 digits where a float may need 17
        return cell
    cell.data_type = "s"
    cell.quotePrefix = bool(_FORMULA.match(value))  # so that editing the cell does not make it a formula either
    return cell


# --- either ------------------------------------------------------------------------------------------------------


def write_sheet(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows in the way that the name asks for; return how many."""
    if str(path).lower().endswith(".xlsx"):
        return sum(write_xlsx(Path(path), {"rows": rows}).values())
    return write_csv(path, rows)
