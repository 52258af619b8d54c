"""JSON Lines, read strictly and written whole: what every file of rows goes through."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rankalign.errors import InputError, Line, RecordError
from rankalign.storage.files import atomic_writer, decode, read_bytes, split_lines
from rankalign.storage.sniff import trouble

Row = tuple[int, dict[str, Any]]
OnError = Callable[[RecordError], None]

HALF_A_PAIR = "holds half of a surrogate pair, which UTF-8 cannot write"
# Lines are decoded as strict UTF-8, so half of a pair can only come from an escape; the search spares other rows a
# walk.
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a finite number")


def _number(word: str) -> float:
    value = float(word)
    return value if math.isfinite(value) else _constant(word)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


# NaN, infinities and numbers beyond a double are refused: a score that is not finite poisons every later comparison.
# So are objects with a key twice: of two values one would be lost in silence.
_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_number, object_pairs_hook=_object)


def loads(text: str) -> Any:
    """Strict ``json.loads``.

    Raises:
        ValueError: with the reason in words: broken JSON, a number that is not finite, a key that stands twice.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None


def read_rows(path: str | os.PathLike[str], on_error: OnError | None = None) -> Iterator[Row]:
    """Yield ``(line, object)`` of a JSON Lines file, or of a file that is one JSON list of objects.

    The line of a list's element is a :class:`Line`, which knows the element's number, too. Blank lines are passed over.
    A bad line goes to ``on_error`` and is left out; without ``on_error`` it raises.

    Raises:
        RecordError: a line is not UTF-8, not JSON or not an object.
        InputError: the file is missing, holds nothing, or is no text at all: UTF-16, a pickle, a Git LFS pointer, ...
    """
    report, content = on_error or give_up, read_bytes(path)
    if wrong := trouble(content):
        raise InputError(f"{path}: {wrong}")
    lines = [(number, raw) for number, raw in split_lines(content) if raw.strip()]
    if not lines:
        raise InputError(f"{path}: the file is empty")
    if lines[0][1].lstrip().startswith(b"["):  # rows are objects, so no file of lines begins so
        yield from list_rows(path, content, report)
        return
    for number, raw in lines:
        try:
            row = _object_at(path, number, decode(path, number, raw))
        except RecordError as error:
            report(error)
        else:
            yield number, row


def give_up(error: RecordError) -> None:
    """The :data:`OnError` that gives up."""
    raise error


def _object_at(path: str | os.PathLike[str], line: int, text: str) -> dict[str, Any]:
    """A JSON object all of whose strings can be written as UTF-8."""
    try:
        value = loads(text)
    except ValueError as error:
        raise RecordError(str(path), line, "", str(error)) from None
    if not isinstance(value, dict):
        raise RecordError(str(path), line, "", f"expected a JSON object, found {kind(value)}")
    if _ESCAPED_SURROGATE.search(text) and (torn := next(_torn_strings(value, ""), None)) is not None:
        raise RecordError(str(path), line, torn, HALF_A_PAIR)
    return value


def _torn_strings(value: Any, path: str) -> Iterator[str]:
    """Paths of the strings, keys included, that hold half of a surrogate pair."""
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        yield path
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from _torn_strings(element, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, element in value.items():
            yield from _torn_strings(key, path)
            yield from _torn_strings(element, f"{path}.{key}" if path else key)


def list_rows(path: str | os.PathLike[str], content: bytes, report: OnError) -> Iterator[Row]:
    """Elements of a JSON list, each with its number and the line on which it starts; it ends where its JSON breaks."""
    text = "\n".join(decode(path, number, raw) for number, raw in split_lines(content))
    line, counted = Line.of(1, 1), 0
    try:
        for number, (start, end) in enumerate(_elements(text), start=1):
            # Only what lies between two elements is counted: counting from the start would take n squared.
            line, counted = Line.of(line + text.count("\n", counted, start), number), start
            try:
                element = _object_at(path, line, text[start:end])
            except RecordError as error:
                report(error)
            else:
                yield line, element
    except json.JSONDecodeError as error:
        reason = f"the JSON list is broken here, and read no further: {error.msg} at column {error.colno}"
        report(RecordError(str(path), Line.of(error.lineno, line.element + (counted > 0)), "", reason))
    except RecursionError:
        report(RecordError(str(path), line, "", "not valid JSON: nested too deeply"))


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the elements of a JSON list, numbers that are not finite let pass: one bad element hides no other."""
    decoder = json.JSONDecoder()
    position = _past_space(text, text.index("[") + 1)
    if not text.startswith("]", position):
        while True:
            start, end = position, decoder.raw_decode(text, position)[1]
            yield start, end
            position = _past_space(text, end)
            if not text.startswith(",", position):
                break
            position = _past_space(text, position + 1)
    if not text.startswith("]", position):
        raise json.JSONDecodeError("expected a comma or the end of the list", text, position)
    if (end := _past_space(text, position + 1)) < len(text):
        raise json.JSONDecodeError("something follows the end of the list", text, end)


def _past_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def dumps(row: Any) -> str:
    """One line of JSON: UTF-8 as it is, no non-finite numbers.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def without_nan(value: Any) -> Any:
    """A result as JSON can hold it: null where a number is not finite, which JSON has no way to write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return [without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_rows(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON Lines atomically (gzip for ``.gz``); return how many."""
    count = 0
    with atomic_writer(path) as out:
        for row in rows:
            out.write(dumps(row).encode("utf-8") + b"\n")
            count += 1
    return count
