"""JSON Lines, read strictly and written whole: what every file of rows goes through."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from rankalign.errors import InputError, RecordError
from rankalign.storage.files import atomic_writer, decode, reading, split_lines
from rankalign.storage.json_list import list_rows
from rankalign.storage.sniff import trouble
from rankalign.storage.strict import HALF_A_PAIR as HALF_A_PAIR
from rankalign.storage.strict import kind as kind
from rankalign.storage.strict import loads as loads
from rankalign.storage.strict import object_at as object_at
from rankalign.storage.strict import quick_object

Row = tuple[int, dict[str, Any]]
OnError = Callable[[RecordError], None]
Quick = Callable[[bytes], Any]
"""Makes of a line what a caller wants of it, in place of its object; None where the line has to be read as usual."""


def read_rows(
    path: str | os.PathLike[str], on_error: OnError | None = None, quick: Quick | None = None
) -> Iterator[Row]:
    """Yield ``(line, object)`` of a JSON Lines file, or of a file that is one JSON list of objects.

    The line of a list's element is a :class:`Line`, which knows the element's number, too. Blank lines are passed over.
    A bad line goes to ``on_error`` and is left out; without ``on_error`` it raises. What ``quick`` makes of a line
    stands in the object's place.

    Raises:
        RecordError: a line is not UTF-8, not JSON or not an object.
        InputError: the file is missing, holds nothing, or is no text at all: UTF-16, a pickle, a Git LFS pointer, ...
    """
    report = on_error or give_up
    with reading(path) as source:
        if wrong := trouble(source.peek()):
            raise InputError(f"{path}: {wrong}")
        lines = split_lines(source)
        first = next(((number, raw) for number, raw in lines if raw.strip()), None)
        if first is None:
            raise InputError(f"{path}: the file is empty")
        rest = itertools.chain([first], lines)
        if first[1].lstrip().startswith(b"["):  # rows are objects, so no file of lines begins so
            yield from list_rows(path, rest, report)
            return
        for number, raw in rest:
            if not raw or raw.isspace():
                continue
            if quick is not None and (made := quick(raw)) is not None:
                yield number, made
                continue
            if (row := quick_object(raw)) is not None:
                yield number, row
                continue
            try:
                row = object_at(path, number, decode(path, number, raw))
            except RecordError as error:
                report(error)
            else:
                yield number, row


def give_up(error: RecordError) -> None:
    """The :data:`OnError` that gives up."""
    raise error


def dumps(row: Any) -> str:
    """One line of JSON: UTF-8 as it is, no non-finite numbers.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


_COMPACT, _SPACED = msgspec.json.Encoder().encode, msgspec.json.format
_MOST = 10_000  # lists and mappings of one row that are looked through; a row that holds itself has no end of them


def encode(row: Any) -> bytes:
    """The UTF-8 bytes of :func:`dumps`, in half its time for rows of plain values.

    Raises:
        ValueError: a number is not finite, or a text holds half of a surrogate pair.
    """
    if _is_plain(row):
        try:
            # With an indent of 0 it writes the blanks that json writes, and one line.
            return _SPACED(_COMPACT(row), indent=0)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError):
            pass  # json says it in the words that callers know, or has a way to write it
    return dumps(row).encode("utf-8")


def _is_plain(row: Any) -> bool:
    """Whether msgspec writes a value as json does: dates, bytes and keys that are no texts it would write, where json
    refuses them or has another form, and json writes 1e+16 and 9e-05 where msgspec writes 1e16 and 0.00009."""
    waiting = [row]
    for value in waiting:
        if type(value) is dict:
            for key in value:
                if type(key) is not str:
                    return False
            value = value.values()
        elif type(value) is not list:
            return False
        for inner in value:
            kind = type(inner)
            if kind is str or kind is bool or kind is int or inner is None:
                continue
            if kind is float:
                if not (1e-4 <= inner < 1e16 or -1e16 < inner <= -1e-4 or inner == 0):
                    return False
            elif kind is dict or kind is list:
                waiting.append(inner)
            else:
                return False
        if len(waiting) > _MOST:
            return False
    return True


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
            out.write(encode(row) + b"\n")
            count += 1
    return count
