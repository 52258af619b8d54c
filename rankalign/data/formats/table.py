"""Rated tables as people keep them: one answer a row, or all answers of a prompt in one row, told what each column is.

``--columns prompt=question,response=answer,score=stars`` says it (:mod:`rankalign.data.formats.layout`); without it the
usual names are taken, and said. It is also how our own records become a sheet: a row an answer, and everything that a
record holds in a column of its own, so that reading the sheet gives the record back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Ids, RowFormat
from rankalign.data.formats.layout import Layout, recognise, told
from rankalign.data.formats.table_row import PREFIXES, ReadRow, flat_rows, read_row, written
from rankalign.data.records import CandidateSet, Checker, Prompt
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import OnError, Row, dumps


@dataclass(frozen=True)
class Table(RowFormat):
    """Rows of one prompt become one record, in the order of their first rows; answers keep their order.

    Attributes:
        layout: what each column is; None tells it by the usual names.
        ignore: columns that may stay unread, or ``all``; they are kept in ``meta``.
    """

    layout: Layout | None = None
    ignore: frozenset[str] = frozenset()
    name = "table"

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from the rows of a table; a bad row goes to ``on_error`` and is left out."""
        held = list(rows)  # a column may first be filled far down
        columns = list(dict.fromkeys(name for _, row in held for name in row))
        layout = self._layout(columns, file)
        # An id that was named, or is ours, tells prompts apart; one that was only recognised may number rows.
        groups = _Groups(file, layout, by_id=bool(layout.id) and (layout.own or self.layout is not None))
        unread = self._unread(layout, columns)
        for line, row in held:
            check = Checker(file, line)
            try:
                _check_unread(check, row, [name for name in unread if row.get(name) is not None])
                groups.add(check, row, read_row(check, row, layout))
            except RecordError as error:
                on_error(error)
        yield from groups.records()

    def _layout(self, columns: list[str], file: str) -> Layout:
        ignored = [name for name in columns if name in self.ignore or "all" in self.ignore]
        if self.layout is None:
            found = recognise(columns)
            rest = [name for name in ignored if name in self._unread(found, columns)]
            _say_ignored(rest, file)
            if not found.own and found.prompt and found.responses:
                print(f"{file}: {told(found)} (another reading: --columns)", file=sys.stderr)
            return replace(found, meta=tuple(rest))
        for name in self.layout.used:
            if name not in columns:
                raise InputError(f"{file}: no column {name!r} (columns: {', '.join(columns)})")
        rest = [name for name in ignored if name not in self.layout.used]
        _say_ignored(rest, file)
        return replace(self.layout, meta=(*self.layout.meta, *rest))

    def _unread(self, layout: Layout, columns: list[str]) -> list[str]:
        known = {*layout.used, *(("finished", "count", "messages", "tokens") if layout.own else ())}
        prefixed = PREFIXES if layout.own else ("score:",)
        return [name for name in columns if name not in known and not name.startswith(prefixed)]

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row as a record of its own."""
        errors: list[RecordError] = []
        found = list(self.read([(check.line, row)], check.file, errors.append))
        if errors:
            raise errors[0]
        return found[0]

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """A row an answer with all that the record holds; one with empty cells for a prompt without answers."""
        for row in flat_rows(record):
            yield {key: written(key, value) for key, value in row.items()}


def _say_ignored(columns: list[str], file: str) -> None:
    if columns:
        print(f"{file}: columns that are not read, but kept in meta: {', '.join(columns)}", file=sys.stderr)


def _check_unread(check: Checker, row: dict[str, Any], unread: list[str]) -> None:
    if unread:
        keep = "|".join(unread)
        raise check.fail(
            ", ".join(unread),
            f"is read as nothing: say with --columns what it is (meta={keep} keeps it), or go on with --ignore_columns",
        )


# --- putting rows together ---------------------------------------------------------------------------------------


@dataclass
class _Group:
    """The rows of one prompt."""

    line: int
    prompt: Prompt
    rows: list[ReadRow]


class _Groups:
    """Rows by prompt, or by id where the ids are known to be those of prompts."""

    def __init__(self, file: str, layout: Layout, by_id: bool) -> None:
        self.file, self.layout, self.by_id = file, layout, by_id
        self.groups: dict[str, _Group] = {}

    def add(self, check: Checker, row: dict[str, Any], read: ReadRow) -> None:
        """Take one row.

        Raises:
            RecordError: another prompt has its id, or it scores an answer a second time in one judge's name.
        """
        key = f"id {read.ident}" if self.by_id and read.ident else f"prompt {dumps(read.prompt)}"
        group = self.groups.setdefault(key, _Group(check.line, read.prompt, []))
        if group.prompt != read.prompt:
            raise check.fail(self.layout.prompt, f"is another than in line {group.line}, which has the same id")
        if self.layout.own and group.rows and (not read.responses or not group.rows[0].responses):
            raise check.fail(self.layout.id, f"stands already on line {group.line}")
        if self.layout.judge:
            _merge_judges(check, group, read, self.layout.judge)
        group.rows.append(read)

    def records(self) -> Iterator[CandidateSet]:
        """A record a prompt."""
        ids = Ids(self.file, ("id",))
        of_prompts = self.by_id or self._ids_are_of_prompts()
        shared = self._shared_meta()
        if not of_prompts:
            where = f"{self.layout.id!r} tells rows apart, not prompts"
            print(f"{self.file}: {where}: it is kept in meta of the answers", file=sys.stderr)
        for group in self.groups.values():
            first = group.rows[0]
            ident = ids.take({"id": first.ident} if of_prompts and first.ident else {}, group.line)
            for row in group.rows:
                own = {name: value for name, value in row.meta.items() if name not in shared}
                own |= {self.layout.id: row.ident} if not of_prompts and row.ident else {}
                for response in row.responses:
                    response.meta |= own
            meta = {name: value for name, value in first.meta.items() if name in shared}
            yield CandidateSet(ident, group.prompt, [r for row in group.rows for r in row.responses], meta)

    def _ids_are_of_prompts(self) -> bool:
        ids = [{row.ident for row in group.rows} for group in self.groups.values()]
        return all(len(each) == 1 for each in ids) and len(set().union(*ids)) == len(ids) if self.layout.id else True

    def _shared_meta(self) -> set[str]:
        """The kept columns that are one value a prompt: they say something of the prompt, the others of the answers."""
        if self.layout.own or self.layout.wide:
            return {name for group in self.groups.values() for row in group.rows for name in row.meta}
        shared = set(self.layout.meta)
        for group in self.groups.values():
            shared -= {n for n in shared if any(row.meta.get(n) != group.rows[0].meta.get(n) for row in group.rows)}
        return shared


def _merge_judges(check: Checker, group: _Group, read: ReadRow, column: str) -> None:
    """Put the score of a further judge to the answer that it is for, in the place of the row's own answer."""
    known = {(response.policy, response.text): response for row in group.rows for response in row.responses}
    for response in list(read.responses):  # a copy: the list itself loses members
        if earlier := known.get((response.policy, response.text)):
            if twice := set(earlier.scores) & set(response.scores):
                raise check.fail(column, f"{', '.join(sorted(twice))} has scored this answer already")
            earlier.scores |= response.scores
            read.responses.remove(response)


def checked_names(names: Sequence[str]) -> frozenset[str]:
    """The columns that ``--ignore_columns`` names."""
    return frozenset(filter(None, (name.strip() for name in names)))


FORMAT = Table()
