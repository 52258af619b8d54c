"""Checks of one row that name file, line and field in what they raise."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

from rankalign.data.messages import (
    MESSAGE_FIELDS,
    NOTHING,
    ROLES,
    SHOWN_COLUMNS,
    Message,
    Prompt,
    decoded,
    said,
    text_of,
)
from rankalign.errors import RecordError
from rankalign.storage.jsonl import HALF_A_PAIR, kind

UNUSED = "has a meaning that is not used yet; take it out of the row, or leave such rows out with --skip_invalid"
PICTURES = "only parts of text can be used: pictures and sound are not passed to models yet"
# A row that sets these would take the place of what a run is told to do, or bring a template of its own.
_NOT_THE_ROWS = (
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "sanitize_control_tokens",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


class Checker:
    """Checks of one row that name file, line and field in what they raise; format readers share it.

    Args:
        file: path for messages.
        line: 1-based line of the row.

    Attributes:
        nulls: columns of the row whose cell is null, where the row was handed on without them.
    """

    def __init__(self, file: str | os.PathLike[str], line: int) -> None:
        self.file, self.line, self.nulls = str(file), line, frozenset[str]()

    def fail(self, path: str, reason: str) -> RecordError:
        """The error for field ``path``, to be raised by the caller."""
        return RecordError(self.file, self.line, path, reason)

    def text(self, value: Any, path: str, empty: bool = True) -> str:
        """A string that can be written as UTF-8; with ``empty=False`` it must hold more than white space."""
        if not isinstance(value, str):
            raise self.fail(path, f"expected a string, found {kind(value)}")
        # Most texts pass by the first test, which is instant.
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise self.fail(path, HALF_A_PAIR)
        if not empty and not value.strip():
            raise self.fail(path, "is empty")
        return value

    def number(self, value: Any, path: str) -> float:
        """A finite number; booleans are not numbers here."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(path, f"expected a number, found {kind(value)}")
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number beyond a double
            finite = False
        if not finite:
            raise self.fail(path, "is not a finite number")
        return value

    def texts(self, values: list[Any], path: str) -> list[str]:
        """A list of strings, see :meth:`text`; paths are made for what is wrong alone."""
        if not all(type(value) is str and value.isascii() for value in values):
            return [self.text(value, f"{path}[{index}]") for index, value in enumerate(values)]
        return values

    def numbers(self, values: list[Any], path: str) -> list[float]:
        """A list of finite numbers."""
        if not all(type(value) is float and math.isfinite(value) for value in values):
            return [self.number(value, f"{path}[{index}]") for index, value in enumerate(values)]
        return values

    def array(self, value: Any, path: str, at_least: int = 0) -> list[Any]:
        """A list of ``at_least`` elements."""
        if not isinstance(value, list):
            raise self.fail(path, f"expected a list, found {kind(value)}")
        if len(value) < at_least:
            raise self.fail(path, f"needs at least {at_least} elements, found {len(value)}")
        return value

    def mapping(self, value: Any, path: str) -> dict[str, Any]:
        """A JSON object."""
        if not isinstance(value, dict):
            raise self.fail(path, f"expected an object, found {kind(value)}")
        return value

    def need(self, row: dict[str, Any], key: str, path: str = "") -> Any:
        """``row[key]`` of the object at ``path``; a missing key is an error that lists what is there."""
        if key not in row and not path and key in self.nulls:
            return None
        if key not in row:
            found = f"found: {', '.join(map(str, row)) or 'nothing'}"
            raise self.fail(f"{path}.{key}" if path else key, f"is missing ({found})")
        return row[key]

    def prompt(self, value: Any, path: str = "prompt") -> Prompt:
        """A non-empty string, or a non-empty list of messages, see :meth:`message`."""
        if isinstance(value, str):
            return self.text(value, path, empty=False)
        if not isinstance(value, list):
            raise self.fail(path, f"expected a string or a list of messages, found {kind(value)}")
        if not value:
            raise self.fail(path, "is empty")
        messages = [self.message(message, f"{path}[{index}]") for index, message in enumerate(value)]
        if not any(text_of(message).strip() or said(message, MESSAGE_FIELDS) for message in messages):
            raise self.fail(path, "is empty")
        return messages

    def message(self, value: Any, path: str) -> Message:
        """A message as it came: a known role, and a content that is a string, a list of text parts, or null where the
        message says something else (a call of a tool)."""
        role = self.text(self.need(self.mapping(value, path), "role", path), f"{path}.role")
        if role not in ROLES:
            raise self.fail(f"{path}.role", f"unknown role {role!r} (one of {', '.join(ROLES)})")
        self.content(value, path)
        return value  # the very object, so that it is written as it came

    def content(self, message: dict[str, Any], path: str) -> str:
        """The text of a message; parts of another kind than ``{"type": "text", "text": ...}`` are refused by name."""
        value = message.get("content")
        if value is None and said(message, MESSAGE_FIELDS):
            return ""
        if not isinstance(value, list):
            return self.text(self.need(message, "content", path), f"{path}.content")
        return "".join(self._part(part, f"{path}.content[{index}]") for index, part in enumerate(value))

    def _part(self, part: Any, path: str) -> str:
        sort = self.mapping(part, path).get("type", "text")
        if sort != "text":
            raise self.fail(path, f"a part of type {sort!r}: {PICTURES}")
        # Tables give every part all columns, null where it has none.
        if others := [key for key, held in part.items() if key not in ("type", "text") and held not in NOTHING]:
            raise self.fail(f"{path}.{others[0]}", UNUSED)
        return self.text(self.need(part, "text", path), f"{path}.text")

    def answer(self, value: Any, path: str) -> list[Message]:
        """An answer of one message or several: the assistant's first and last, results of tools between its turns."""
        messages = [self.message(m, f"{path}[{i}]") for i, m in enumerate(self.array(value, path))]
        roles = [message["role"] for message in messages]
        if len(roles) == 1 and roles != ["assistant"]:
            raise self.fail(f"{path}[0].role", f"expected 'assistant', found {roles[0]!r}")
        turns = list(itertools.pairwise(roles))
        known = {"assistant", "tool"}.issuperset(roles) and ("assistant", "assistant") not in turns
        if not known or roles[:1] != ["assistant"] or roles[-1:] != ["assistant"]:
            raise self.fail(
                path,
                f"holds {len(roles)} messages ({', '.join(roles)}) where a response is the assistant's, with the "
                "results of tools between its turns",
            )
        return messages

    def columns(self, row: dict[str, Any]) -> None:
        """What a row says to a model beside its prompt: tools and documents are lists of objects, keyword arguments
        an object, also as JSON text."""
        for key in said(row, SHOWN_COLUMNS):
            value = decoded(row[key])
            if key == "chat_template_kwargs":
                names = self.mapping(value, key)
                if wrong := next((n for n in names if n in _NOT_THE_ROWS or n.endswith("_token")), ""):
                    raise self.fail(f"{key}.{wrong}", "is not a row's to say")
                continue
            for index, entry in enumerate(self.array(value, key)):
                if not isinstance(decoded(entry), dict):
                    raise self.fail(f"{key}[{index}]", f"expected an object, found {kind(entry)}")
