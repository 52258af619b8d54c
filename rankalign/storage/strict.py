"""A JSON value read strictly: nothing that would be lost, rounded or refused later comes in unnoticed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from rankalign.errors import RecordError

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


_QUICKLY = msgspec.json.Decoder(dict[str, Any]).decode


def quick_object(line: bytes) -> dict[str, Any] | None:
    """The object of a line as :func:`object_at` reads it, in a third of the time; None where it must look for itself.

    msgspec refuses what is refused there, but for a key that stands twice, of which it keeps the last value.
    """
    try:
        row = _QUICKLY(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return row if quotes(line) == 2 * strings(row) else None


def quotes(line: bytes) -> int:
    """How many quotes begin or end a text of a line of JSON: more than twice its keys and texts where a key stood twice
    and msgspec kept one of them."""
    found = line.count(b'"')
    if b"\\" not in line:
        return found
    # An escaped backslash escapes no quote behind it. A run of backslashes begins with an escape, so that pairs from
    # its left are those.
    return found - line.replace(b"\\\\", b"").count(b'\\"')


def strings(value: Any) -> int:
    """How many keys and texts a decoded list or mapping holds."""
    count, waiting = 0, [value]
    for outer in waiting:
        if type(outer) is dict:
            count += len(outer)
            outer = outer.values()
        for inner in outer:
            if type(inner) is str:
                count += 1
            elif type(inner) is dict or type(inner) is list:
                waiting.append(inner)
    return count


def object_at(path: str | os.PathLike[str], line: int, text: str) -> dict[str, Any]:
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


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
