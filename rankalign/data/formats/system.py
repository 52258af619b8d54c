"""A column with the system message beside a prompt that has none, put where a model reads it, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from rankalign.data.records import CandidateSet, Checker
from rankalign.data.templates import as_messages

COLUMNS = ("system", "system_prompt", "system_message")
NOTE = "system_column"


def take_system(
    row: dict[str, Any], check: Checker, own: tuple[str, ...] = ()
) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """Column and text of a row's system message, and the row without it; blank ones, and the format's ``own``,
    stay where they are.

    Raises:
        RecordError: two columns are filled, or one holds no text.
    """
    filled = [column for column in COLUMNS if column in row and column not in own and not _is_blank(row[column])]
    if not filled:
        return None, row
    if len(filled) > 1:
        raise check.fail(filled[1], f"stands beside {filled[0]!r}, which means the same")
    (column,) = filled
    text = check.text(row[column], column)
    return (column, text), {key: value for key, value in row.items() if key != column}


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def put_system(record: CandidateSet, form: str, column: str, text: str, check: Checker) -> None:
    """Begin the record's prompt with the system message ``text``; a prompt of its own words becomes a user message.

    Raises:
        RecordError: the prompt has another system message already.
    """
    messages = as_messages(record.prompt)
    if messages[0]["role"] == "system":
        if messages[0]["content"].strip() != text.strip():
            raise check.fail(column, "differs from the system message that the prompt begins with")
        record.meta.setdefault(form, {})[NOTE] = {"column": column, "text": text, "form": "twice"}
        return
    note = {"column": column, "text": text, "form": "text" if isinstance(record.prompt, str) else "messages"}
    record.meta.setdefault(form, {})[NOTE] = note
    record.prompt = [{"role": "system", "content": text}, *messages]


def without_system(record: CandidateSet, form: str) -> tuple[CandidateSet, dict[str, str]]:
    """The record as it was before :func:`put_system`, and the column; as it is where its prompt was changed since."""
    layout = record.meta.get(form)
    note = layout.get(NOTE) if isinstance(layout, dict) else None
    if not note or not isinstance(record.prompt, list) or record.prompt[0].get("role") != "system":
        return record, {}
    if record.prompt[0]["content"].strip() != note["text"].strip():
        return record, {}
    column = {note["column"]: note["text"]}
    if note["form"] == "twice":
        return record, column
    rest = record.prompt[1:]
    return dataclasses.replace(record, prompt=rest[0]["content"] if note["form"] == "text" else rest), column
