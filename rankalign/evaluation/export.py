"""Tables as files, for ``--table``: CSV, TSV, XLSX for programs, Markdown, LaTeX and HTML for texts."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import Table, cell, printable
from rankalign.registry import did_you_mean
from rankalign.storage.delimited import write_csv
from rankalign.storage.files import write_text
from rankalign.storage.workbook import need_openpyxl, write_xlsx

if TYPE_CHECKING:
    import pandas as pd

ENDINGS = (".csv", ".tsv", ".xlsx", ".md", ".tex", ".html")
_SHEET_NAME = 31  # characters, of a sheet of an .xlsx file
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{THIN SPACE}": r"\,",
    "\N{EN DASH}": "--",
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def check_target(path: str) -> None:
    """Refuse a name that no table can be written to, before the work whose table it is.

    Raises:
        InputError: its ending is none of :data:`ENDINGS`, or the package for it is missing.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise InputError(f"--table {path}: unknown ending {ending!r}{did_you_mean(ending, ENDINGS)}")
    if ending == ".xlsx":
        need_openpyxl(path)


def frame(table: Table) -> pd.DataFrame:
    """A table as a pandas frame, its values as they are; columns without a heading are called by their number."""
    import pandas as pd

    names = [name or str(number) for number, name in enumerate(table.columns, start=1)]
    return pd.DataFrame(table.rows, columns=_distinct(names), dtype=object)


def write_tables(path: str | os.PathLike[str], tables: Sequence[Table]) -> list[str]:
    """Write tables in the way that the name asks for, atomically.

    Sheets of one workbook for ``.xlsx``; sections of one page for ``.md``, ``.tex`` and ``.html``; for ``.csv`` and
    ``.tsv`` the first into ``path`` and each other one beside it, its title in the name.

    Returns:
        The files that were written.

    Raises:
        InputError: there is no table, or it cannot be written.
    """
    if not tables:
        raise InputError(f"{path}: there is no table to write")
    ending = Path(path).suffix.lower()
    if ending in (".csv", ".tsv"):
        return _write_beside(Path(path), tables)
    if ending == ".xlsx":
        names = _distinct([_sheet_name(table.title) for table in tables])
        sheets = {name: _rows(table) for name, table in zip(names, tables, strict=True)}
        if told := [{"sheet": n, "note": t.note} for n, t in zip(names, tables, strict=True) if t.note]:
            sheets[_distinct([*names, "notes"])[-1]] = told
        write_xlsx(path, sheets)
    else:
        write_text(path, _PAGES[ending](tables))
    return [str(path)]


def _write_beside(path: Path, tables: Sequence[Table]) -> list[str]:
    names = _distinct([re.sub(r"\W+", "-", table.title.lower()).strip("-") or "table" for table in tables])
    paths = [path, *(path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names[1:])]
    for target, table in zip(paths, tables, strict=True):
        write_csv(target, _rows(table))
    return list(map(str, paths))


def _rows(table: Table) -> list[dict[str, Any]]:
    found = frame(table)
    rows = [dict(zip(found.columns, map(_plain, row), strict=True)) for row in found.itertuples(index=False)]
    return rows or [dict.fromkeys(found.columns)]  # the headings of a table without rows


def _plain(value: Any) -> Any:
    """Numbers as they are; texts as they are shown, without what steers a terminal."""
    return value if value is None or isinstance(value, bool | int | float) else printable(str(value))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that an earlier one has but for capitals."""
    found: list[str] = []
    for name in names:
        number, own = 1, name
        while own.lower() in (other.lower() for other in found):
            number += 1
            own = f"{name[: _SHEET_NAME - 4]} {number}"  # with room for a blank and three digits
        found.append(own)
    return found


def _sheet_name(title: str) -> str:
    return re.sub(r"[\[\]:*?/\\]", " ", printable(title))[:_SHEET_NAME].strip(" '") or "table"


# --- pages -------------------------------------------------------------------------------------------------------


def _shown(table: Table, escape: Callable[[str], str]) -> tuple[list[str], list[list[str]], list[bool]]:
    """Headings and cells as people read them, escaped, and which columns are numbers."""
    found = frame(table)
    rows = [[escape(cell(value)) for value in row] for row in found.itertuples(index=False)]
    numeric = [
        bool(rows) and all(isinstance(row[index], int | float | None) for row in table.rows)
        for index in range(len(found.columns))
    ]
    return [escape(printable(name)) for name in table.columns], rows, numeric


def _markdown(tables: Sequence[Table]) -> str:
    def escape(text: str) -> str:
        return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))

    parts = []
    for table in tables:
        names, rows, numeric = _shown(table, escape)
        line = ["---:" if number else "---" for number in numeric]
        grid = "\n".join(f"| {' | '.join(row)} |" for row in (names, line, *rows))
        parts += [
            f"## {escape(printable(table.title))}",
            grid,
            *([escape(printable(table.note))] if table.note else []),
        ]
    return "\n\n".join(parts) + "\n"


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split(" ")).replace("\n", " "))


def _latex(tables: Sequence[Table]) -> str:
    """``tabular`` environments with booktabs' rules, in a ``table`` each."""
    parts = []
    for table in tables:
        names, rows, numeric = _shown(table, _latex_text)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(printable(table.title))}}}"]
        lines += [rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}", r"\toprule"]
        lines += [rf"{' & '.join(names)} \\", r"\midrule", *(rf"{' & '.join(row)} \\" for row in rows), r"\bottomrule"]
        lines += [r"\end{tabular}"]
        lines += [rf"\par\smallskip {_latex_text(printable(table.note))}"] if table.note else []
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(["% needs \\usepackage{booktabs}", *parts]) + "\n"


def _html(tables: Sequence[Table]) -> str:
    parts = ["<!doctype html>", '<meta charset="utf-8">', f"<title>{html.escape(printable(tables[0].title))}</title>"]
    for table in tables:
        names, rows, _ = _shown(table, html.escape)
        parts += ["<table>", f"<caption>{html.escape(printable(table.title))}</caption>"]
        parts += [_html_row("th", names), *(_html_row("td", row) for row in rows), "</table>"]
        parts += [f"<p>{html.escape(printable(table.note))}</p>"] if table.note else []
    return "\n".join(parts) + "\n"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in cells)}</tr>"


_PAGES: dict[str, Callable[[Sequence[Table]], str]] = {".md": _markdown, ".tex": _latex, ".html": _html}
