"""Candidates from a file of any known format, recognised by the keys of its first record."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rankalign.errors import InputError
from rankalign.formats import FORMATS
from rankalign.records import CandidateSet, OnError, read_rows

# The keys that tell a format; the first row of the table that fits is taken.
SHAPES: tuple[tuple[str, frozenset[str]], ...] = (
    ("rankalign", frozenset({"id", "prompt"})),
    ("rrhf", frozenset({"query", "responses"})),
    ("trl", frozenset({"chosen", "rejected"})),
    ("trl", frozenset({"prompt", "completion"})),
    ("trl", frozenset({"messages"})),
    ("alpaca", frozenset({"instruction", "output"})),
)
# A record of ours has no other keys than these; `id` and `prompt` alone also stand in many foreign rows.
NATIVE = frozenset({"id", "prompt", "responses", "meta"})


def detect(row_keys: set[str]) -> str | None:
    """Name of the format whose keys these are, or None."""
    fits = (name for name, keys in SHAPES if keys <= row_keys and (name != "rankalign" or row_keys <= NATIVE))
    return next(fits, None)


def load(
    path: str | os.PathLike[str], format_name: str = "auto", on_error: OnError | None = None
) -> Iterator[CandidateSet]:
    """Records of a file.

    Args:
        path: the file.
        format_name: a name in ``rankalign ls formats``, or ``auto``.
        on_error: takes each bad record, which is left out; without it the first one raises.

    Raises:
        InputError: the format cannot be told.
    """

    def stop(error: Exception) -> None:
        raise error

    rows = list(read_rows(path, on_error))
    if format_name == "auto":
        keys = set(rows[0][1]) if rows else set()
        found = detect(keys)
        if found is None:
            raise InputError(
                f"{path}: cannot tell the format from the keys {', '.join(sorted(keys)) or '(none)'}; name it, "
                f"e.g. --data_format rrhf (known: {', '.join(FORMATS)})"
            )
        format_name = found
    yield from FORMATS.load(format_name).read(rows, str(path), on_error or stop)
