"""A file that is one JSON list, an element at a time: what is held of it is the element and a block around it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from rankalign.errors import Line, RecordError
from rankalign.storage.files import BLOCK, decode
from rankalign.storage.strict import object_at

Lines = Iterator[tuple[int, bytes]]


class _Text:
    """The text of a file from some place on; more of it is read as it is needed.

    Attributes:
        text: what is held.
        line: number of the line that ``text`` begins in.
        column: characters of that line before ``text``.
    """

    def __init__(self, path: str | os.PathLike[str], lines: Lines) -> None:
        self._path, self._lines = path, lines
        number, raw = next(lines)
        self.text, self.line, self.column = decode(path, number, raw), number, 0

    def more(self) -> bool:
        """Read on; False at the end. An element that does not fit is read in blocks that double, so in linear time."""
        parts, size, wanted = [self.text], 0, max(BLOCK, len(self.text))
        for number, raw in self._lines:
            parts.append(decode(self._path, number, raw))
            size += len(raw) + 1
            if size >= wanted:
                break
        self.text = "\n".join(parts)
        return len(parts) > 1

    def drop(self, end: int) -> None:
        """Forget what stands before ``end``."""
        self.line += self.text.count("\n", 0, end)
        last = self.text.rfind("\n", 0, end)
        self.column = self.column + end if last < 0 else end - last - 1
        self.text = self.text[end:]

    def past_space(self, at: int) -> int:
        """The place of the next character that is no white space, or the end."""
        while True:
            while at < len(self.text) and self.text[at] in " \t\r\n":
                at += 1
            if at < len(self.text) or not self.more():
                return at

    def past_value(self, decoder: json.JSONDecoder, at: int) -> int:
        """The end of the value that begins at ``at``."""
        while True:
            try:
                end = decoder.raw_decode(self.text, at)[1]
            except json.JSONDecodeError as error:
                # A text that was cut is wrong where it was cut, or is a string without an end.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if not (cut and self.more()):
                    raise
            else:
                if end < len(self.text) or not self.more():  # a number might go on
                    return end

    def place(self, error: json.JSONDecodeError) -> tuple[int, int]:
        """Line and column of an error in the file."""
        return self.line + error.lineno - 1, error.colno + (self.column if error.lineno == 1 else 0)


def list_rows(
    path: str | os.PathLike[str], lines: Lines, report: Callable[[RecordError], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Elements of a JSON list, each with its number and the line on which it starts; it ends where its JSON breaks.

    Args:
        path: the file, for messages.
        lines: its lines from the one with the bracket on.
        report: takes the errors.
    """
    text, number, line = _Text(path, lines), 0, Line.of(1, 1)
    try:
        for number, (start, element) in enumerate(_elements(text), start=1):
            line = Line.of(start, number)
            try:
                row = object_at(path, line, element)
            except RecordError as error:
                report(error)
            else:
                yield line, row
    except json.JSONDecodeError as error:
        at, column = text.place(error)
        reason = f"the JSON list is broken here, and read no further: {error.msg} at column {column}"
        report(RecordError(str(path), Line.of(at, number + 1), "", reason))
    except RecursionError:
        report(RecordError(str(path), line, "", "not valid JSON: nested too deeply"))


def _elements(text: _Text) -> Iterator[tuple[int, str]]:
    """Line and text of each element, numbers that are not finite let pass: one bad element hides no other."""
    decoder = json.JSONDecoder()
    while (opened := text.text.find("[")) < 0 and text.more():
        pass
    at = text.past_space(opened + 1)
    if not text.text.startswith("]", at):
        line, counted = text.line, 0
        while True:
            # Only what lies between two elements is counted: counting from the start would take n squared.
            line, counted = line + text.text.count("\n", counted, at), at
            end = text.past_value(decoder, at)
            yield line, text.text[at:end]
            at = text.past_space(end)
            if not text.text.startswith(",", at):
                break
            at = text.past_space(at + 1)
            if at > BLOCK:
                line += text.text.count("\n", counted, at)
                text.drop(at)
                at = counted = 0
    if not text.text.startswith("]", at):
        raise json.JSONDecodeError("expected a comma or the end of the list", text.text, at)
    if (end := text.past_space(at + 1)) < len(text.text):
        raise json.JSONDecodeError("something follows the end of the list", text.text, end)
