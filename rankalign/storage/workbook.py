"""XLSX files as rows of cells, and rows as such files in which every text is stored as text. Needs openpyxl."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rankalign.errors import InputError, RecordError, missing_extra
from rankalign.storage.delimited import FORMULA, Cells, Spool
from rankalign.storage.files import atomic_writer
from rankalign.storage.jsonl import OnError, dumps

# OOXML spells what XML cannot hold as _xHHHH_, carriage returns too (XML reads them as line feeds), and so must the
# underscore of a text that looks like such a spelling.
_ESCAPE = re.compile("_(?=x[0-9A-Fa-f]{4})|[\x00-\x08\x0b-\x1f\ufffe\uffff]")
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
_MOST_ROWS, _MOST_CHARACTERS = 1_048_576, 32_767  # of an XLSX sheet, of a cell in it
EXACT = 2**53  # the largest whole number up to which a float, and so Excel, holds every digit


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


def xlsx_rows(path: str | os.PathLike[str], on_error: OnError) -> Iterator[Cells]:
    """Rows of the only sheet that holds any. Formulas are read as the value that was stored with them."""
    openpyxl = need_openpyxl(path)
    try:
        # One gives formulas, the other the values stored with them: a formula without a value is no empty cell.
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
                while cells and cells[-1] is None:  # cells that were only ever formatted
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
    if isinstance(stored.value, float) and stored.value.is_integer() and abs(stored.value) > EXACT:
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
        spools = {name: stack.enter_context(Spool(_fitting(path, rows))) for name, rows in sheets.items()}
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
    if value is None or (isinstance(value, bool | int | float) and abs(value) <= EXACT):
        return value
    text = value if isinstance(value, str) else dumps(value)
    return _ESCAPE.sub(lambda found: f"_x{ord(found[0]):04X}_", text)


def _xlsx_cell(sheet: Any, value: Any) -> Any:
    """A cell; texts are marked as such, whatever they begin with."""
    if not isinstance(value, str | float):
        return value
    from openpyxl.cell import WriteOnlyCell

    cell: Any = WriteOnlyCell(sheet, value)
    if isinstance(value, float):
        cell._value = repr(value)  # openpyxl writes 16 digits where a float may need 17
        return cell
    cell.data_type = "s"
    cell.quotePrefix = bool(FORMULA.match(value))  # so that editing the cell does not make it a formula either
    return cell
