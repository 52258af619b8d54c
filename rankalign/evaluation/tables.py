"""Tables for people: in the terminal by rich, in the report as HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.evaluation import EvalResult

# Control characters steer a terminal (colours, titles, cursor), and direction overrides make text read as what it is
# not; both may come in with model output.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


FEW = 6
"""Columns that fit side by side in a terminal of 80 characters."""


@dataclass
class Table:
    """A small table.

    Attributes:
        title: what it shows.
        columns: headings; the first column names the rows.
        rows: cells: text, numbers, or None where there is no value.
        note: a line below, such as what n and the intervals are.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""


def printable(text: str) -> str:
    """Text without control characters and direction overrides; line feeds and tabs stay."""
    return UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


WIDE = 1000  # columns of what is no terminal


def cell(value: Any) -> str:
    """A value as people read it: four significant digits, thousands by blanks, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    if float(value).is_integer() and abs(value) < 1e15:  # up to where a float still has all its digits
        return f"{int(value):,}".replace(",", "\N{THIN SPACE}")
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}".replace(",", "\N{THIN SPACE}")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names for a message."""
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def interval(bounds: tuple[float, float] | list[float] | None) -> str:
    """An interval as text, such as ``[0.12, 0.3]``."""
    return "–" if bounds is None else f"[{cell(bounds[0])}, {cell(bounds[1])}]"


def from_result(title: str, result: EvalResult) -> Table:
    """The table of one evaluation: metric, value, 95 % interval."""
    rows = [[name, value, interval(result.ci95.get(name))] for name, value in result.metrics.items()]
    return Table(
        title, ["metric", "value", "95 % interval"], rows, f"n = {result.n}; intervals bootstrapped over prompts"
    )


def from_dict(row: Mapping[str, Any]) -> Table:
    """A table as ``result.json`` holds it: ``title``, ``columns``, ``rows``, optionally ``note``."""
    return Table(str(row["title"]), [str(c) for c in row["columns"]], list(row["rows"]), str(row.get("note", "")))


def turned(table: Table) -> Table:
    """A table of one row as one of two columns: side by side, many values would be cut to fit a terminal."""
    pairs = zip(table.columns, table.rows[0], strict=True)
    return Table(table.title, ["", ""], [[name, cell(value)] for name, value in pairs], table.note)


def render(table: Table, stderr: bool = False) -> None:
    """Print a table to standard output, or to standard error beside ``--json``.

    Plain and as wide as it needs where that is no terminal; in a terminal too narrow for it, cells fold. None is cut.
    """
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    if len(table.rows) == 1 and len(table.columns) > FEW:
        table = turned(table)
    grid = RichTable(title=Text(printable(table.title)), caption=Text(printable(table.note)), title_justify="left")
    for index, name in enumerate(table.columns):
        numeric = index > 0 and all(isinstance(row[index], int | float | None) for row in table.rows)
        grid.add_column(Text(printable(name)), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell(value)) for value in row))
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = WIDE
    console.print(grid)
