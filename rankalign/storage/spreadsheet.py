"""Spreadsheets: CSV, TSV and XLSX, both ways, a row at a time.

An empty cell is a column that the row does not have. A row that has more or fewer cells than there are columns, bytes
that are not UTF-8 and a quote that never closes are errors, not guesses. Texts that a spreadsheet program would take
for formulas are written so that it does not (see :func:`rankalign.storage.delimited.write_csv`), and come back as
they were.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from rankalign.errors import InputError, RecordError
from rankalign.storage.delimited import GUARDED, Cells, csv_rows, write_csv
from rankalign.storage.jsonl import OnError, Row, loads
from rankalign.storage.workbook import EXACT, write_xlsx, xlsx_rows

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
# Columns of the formats we know that hold numbers, truth values or lists; a cell of any other column is a text.
_NUMERIC = re.compile(r"(?:.*_)?(?:scores?|labels?|rating|rewards?|margin|preference|rank|votes|chosen_score)(?:_\w+)?")
_NESTED = {"responses", "scores", "completions", "conversations", "messages", "context", "prefix", "suffix", "reward"}
_NESTED |= {"text", "score", "models", "annotations", "candidates", "tools", "responses_and_scores"}


def is_spreadsheet(path: str | os.PathLike[str]) -> bool:
    """Whether a name ends in .csv, .tsv (gzip or not) or .xlsx."""
    name = str(path).lower()
    return name.removesuffix(".gz").endswith((".csv", ".tsv")) or name.endswith(".xlsx")


def check_lines(path: str | os.PathLike[str]) -> None:
    """Refuse to write JSON Lines under the name of a table.

    Raises:
        InputError: its ending says CSV, XLSX, Parquet or the like.
    """
    if is_spreadsheet(path) or str(path).lower().endswith(".parquet"):
        raise InputError(
            f"{path}: records are written as JSON Lines; name the output with .jsonl, and `rankalign convert` makes a "
            "table of it"
        )


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
        yield from (xlsx_rows if str(path).lower().endswith(".xlsx") else csv_rows)(path, on_error)
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
    if isinstance(cell, float) and cell.is_integer() and abs(cell) <= EXACT:
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


# --- writing -----------------------------------------------------------------------------------------------------


def write_sheet(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows in the way that the name asks for; return how many."""
    if str(path).lower().endswith(".xlsx"):
        return sum(write_xlsx(Path(path), {"rows": rows}).values())
    return write_csv(path, rows)
