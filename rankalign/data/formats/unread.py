"""Columns that nothing was made of: which of them only describe a row, which could hold an answer or a verdict.

A table of somebody else may call its answers ``response_0`` and its verdict ``better_response_id``. A reader that takes
the prompt and leaves those in ``meta`` has read prompts without answers, and nobody would know. So every column that a
format does not read is either one of the names by which data sets describe their rows, or it is named: the row is
refused where nothing in it was scored, and counted where the record has its verdict all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import FORMATS
from rankalign.data.messages import SHOWN_COLUMNS
from rankalign.data.records import CandidateSet

ALL = "all"
# Where a row is from, what it is about, who made it and when.
_NAMES = re.compile(
    r"ids?|idx|index|u?uid|guid|key|hash|md5|sha256|fingerprint|sources?|origin|datasets?|subset|split|config|categor(?:y|ies)"
    r"|subcategory|cluster|topics?|domain|subject|tasks?|type|kind|tags?|lang|languages?|locale|country|urls?|links?"
    r"|licen[sc]e|authors?|worker|batch|date|time|timestamp|tstamp|created|updated|version|models?|generator|polic(?:y|ies)"
    r"|seed|meta|metadata"
)
_SUFFIX = re.compile(
    r"(?:^|[_.-])(?:ids?|idx|index|uuid|hash|md5|sha\d*|sources?|url|lang|language|date|time|at|timestamp|models?|name|type"
    r"|version|tokens|length|len|seed)$|^(?:num|n|nb|has)_"
)
# `better_response_id` is no id: a name with one of these is a verdict whatever it ends with.
_VERDICT = re.compile(
    r"better|worse|best|saf(?:e|er|est)(?:_|$)|chosen|reject|winn|loser|prefer|correct|label|rank|rating|score|reward"
    r"|accept|select|pick|judg|grade|vote"
)


def describes(column: str) -> bool:
    """Whether the name of a column says that it describes the row: ids, sources, languages, dates, models, sizes.

    >>> [describes(name) for name in ("prompt_id", "source", "better_response_id", "response_b", "rating")]
    [True, True, False, False, False]
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()  # `responseId` reads as `response_id`
    return bool(_NAMES.fullmatch(name) or (_SUFFIX.search(name) and not _VERDICT.search(name)))


def says_something(value: Any) -> bool:
    """Whether a cell holds anything: null, a blank text and an empty list, also one written as text, do not."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and (not isinstance(value, list | dict) or bool(value))


def unread(columns: dict[str, Any], read: Iterable[str]) -> list[str]:
    """The names among ``columns`` that hold something, do not describe the row and are not in ``read``."""
    known = frozenset(read)
    return [
        name for name, value in columns.items() if name not in known and says_something(value) and not describes(name)
    ]


def left_unread(record: CandidateSet) -> list[str]:
    """Columns that wait unread in the ``meta`` of a record, whichever format it was read from."""
    names = [name for name in record.meta if name in FORMATS]
    forms = [form for name in names if hasattr(form := FORMATS.load(name), "unread")]
    found = [column for form in forms for column in form.unread(record)]
    rest = {key: value for key, value in record.meta.items() if key not in (*FORMATS, *SHOWN_COLUMNS)}
    return list(dict.fromkeys(found)) if forms else unread(rest, ())


@dataclass(frozen=True)
class Ignored:
    """The columns that are left unread by wish: they wait in ``meta`` and are counted.

    Attributes:
        names: by name; such a column is hidden from the reader, also where it would be read.
        everything: whether whatever a format does not read is left so.
    """

    names: frozenset[str] = frozenset()
    everything: bool = False

    @classmethod
    def of(cls, wish: str | Iterable[str]) -> Ignored:
        """From what ``--ignore_columns`` says: names with commas between them, or ``all``."""
        parts = wish.split(",") if isinstance(wish, str) else wish
        names = frozenset(filter(None, map(str.strip, parts)))
        return cls(names - {ALL}, ALL in names)

    def hide(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A row without the columns named here and without null cells, and those columns and cells."""
        hidden = {key: value for key, value in row.items() if value is None or key in self.names}
        return ({key: value for key, value in row.items() if key not in hidden} if hidden else row), hidden


NOTHING = Ignored()


def refusal(columns: list[str], form: str) -> str:
    """Why a row whose ``columns`` nobody reads is refused, and the ways on."""
    listed = ", ".join(map(repr, columns))
    return (
        f"format {form!r} finds no score here and leaves unread: {listed}. Name the format with --from or --format, or "
        f"go on with --ignore_columns {','.join(columns)} (or all): they stay in meta"
    )
