"""JSON files that hold one object: a list of rows under a usual key, one row on several lines, or columns."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

from rankalign.errors import InputError
from rankalign.storage.files import decode, read_text, reading, split_lines
from rankalign.storage.json_list import list_rows
from rankalign.storage.jsonl import OnError, Row, give_up, loads

# Where exports keep their rows. Only alone: what stands beside them may say how they are to be read.
WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "entries", "dataset")
_LINES = "pandas.read_json(F).to_json(G, orient='records', lines=True)"


def unwrapped(path: str | os.PathLike[str], on_error: OnError | None = None) -> Iterator[Row] | None:
    """The rows of a ``.json`` file that is one object; None where it is something else, and read as such.

    Raises:
        InputError: the object holds columns, from which no row can be told for sure.
    """
    if not str(path).removesuffix(".gz").endswith(".json"):
        return None
    with reading(path) as source:
        lines = ((number, raw) for number, raw in split_lines(source) if raw.strip())
        first, second = next(lines, (0, b"")), next(lines, None)
        if not first[1].lstrip().startswith(b"{") or (second and _is_row(path, *first)):
            return None  # only what may be one object is read whole
    try:
        value = loads(read_text(path))
    except (ValueError, InputError):
        return None  # lines, each an object, or broken: whoever reads lines says where
    if list(value) in [[key] for key in WRAPPERS] and _rows(next(iter(value.values()))):
        inside = read_text(path).rstrip().removesuffix("}").encode("utf-8")
        return list_rows(path, split_lines(io.BytesIO(inside)), on_error or give_up)
    if _columns(value):
        raise InputError(f"{path}: holds columns ({', '.join(value)}), not rows: write rows, as {_LINES} does")
    return iter([(1, value)])


def _is_row(path: str | os.PathLike[str], number: int, raw: bytes) -> bool:
    """Whether a line is a value by itself, so that the file is one of lines."""
    try:
        loads(decode(path, number, raw))
    except (ValueError, InputError):
        return False
    return True


def advice(row: dict[str, Any]) -> str:
    """What to do about a row of no known format that holds lists of rows; empty where it does not."""
    held = [key for key, value in row.items() if _rows(value)]
    if not held:
        return ""
    way = f"`jq -c '.{held[0]}[]' F > G.jsonl`"
    return f"it is one object with rows under {', '.join(held)}: take them out, as {way} does; "


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _columns(value: dict[str, Any]) -> bool:
    """Lists of one length without structure, as ``datasets`` holds a batch, or objects with one set of row labels."""
    parts = list(value.values())
    if len(parts) < 2:
        return False
    if all(isinstance(part, list) for part in parts):
        plain = not any(isinstance(each, dict | list) for part in parts for each in part)
        return plain and len({len(part) for part in parts}) == 1
    labels = {tuple(part) if isinstance(part, dict) else None for part in parts}
    return None not in labels and len(labels) == 1 and all(key.isdigit() for key in next(iter(labels)) or ("",))
