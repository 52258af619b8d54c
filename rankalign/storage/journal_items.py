"""The lines of a journal, and an index of them: of an item its place in the file is held, and not its value."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.storage.files import BLOCK
from rankalign.storage.jsonl import dumps, loads
from rankalign.storage.places import ABSENT, Places

Key = tuple[str, ...]
_READ = 4096  # bytes that most lines fit into


class Items(Mapping[Key, Any]):
    """Values by key, each read from the journal when it is asked for; in the order of the file.

    Args:
        handle: of the journal, open for reading.
        path: of the journal, for messages.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self._handle, self._path = handle, path
        self._places = Places()
        # How many calls are kept, by policy or judge and by whether a prompt asked for them.
        self.calls: Counter[tuple[str, bool]] = Counter()

    def note(self, key: Key, offset: int) -> None:
        """The line of ``key`` begins at ``offset``; one before it counts no more."""
        if len(key) == 4 and key[0] == "call" and key not in self._places:
            self.calls[key[1], key[2] != ""] += 1
        self._places.put(key, offset)

    def __contains__(self, key: object) -> bool:
        return self._places.find(key) != ABSENT

    def __getitem__(self, key: Key) -> Any:
        if (offset := self._places.find(key)) == ABSENT:
            raise KeyError(key)
        found = unpack(self._line_at(offset))
        if found is None or found[0] != key:
            # The file was changed by somebody else, or, with a chance that `Places` tells, two keys share a hash.
            raise InputError(
                f"{self._path}: no item {' '.join(key)} where one was written; start over with --overwrite"
            )
        return found[1]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Key]:
        for offset, line in whole_lines(self._path):
            key = key_of(line)
            if self._places.find(key) == offset:
                yield key

    def _line_at(self, offset: int) -> bytes:
        line, size = b"", _READ
        while b"\n" not in line and len(more := os.pread(self._handle, size, offset + len(line))):
            line, size = line + more, 2 * size
        return line.partition(b"\n")[0]


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its offset, without its line feed; what is torn at the end is left out.

    Raises:
        InputError: a line before the last is damaged.
    """
    offset, damaged = 0, 0
    with open(path, "rb", BLOCK) as source:
        for number, raw in enumerate(source, start=1):
            if damaged:
                raise InputError(f"{path}:{damaged}: damaged line; delete the journal to start over")
            if raw[-1:] != b"\n":
                return  # torn
            line = raw[:-1]
            if is_whole(line):
                yield offset, line
                offset += len(raw)
            else:
                damaged = number  # the last one may be: a block that was cut can end in a line feed of its own


def is_whole(line: bytes) -> bool:
    """Whether a line's check fits its body."""
    return line[8:9] == b" " and line[:8] == b"%08x" % zlib.crc32(memoryview(line)[9:])


_DECODER = json.JSONDecoder()
_HEAD = 512  # bytes; keys are shorter but for very long ids


def key_of(line: bytes) -> Key:
    """The key of a whole line, its value passed over."""
    # The value may be long: only the head is made text, unless a character or the key goes on behind it.
    for size in (_HEAD, len(line)):
        try:
            return tuple(_DECODER.raw_decode(line[9:size].decode("utf-8", "ignore"), 1)[0])
        except json.JSONDecodeError:
            if size >= len(line):
                raise
    raise AssertionError("unreachable")


def pack(key: Key, value: Any) -> bytes:
    """The line of an item."""
    body = dumps([list(key), value]).encode("utf-8")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def unpack(line: bytes) -> tuple[Key, Any] | None:
    """The item of a line, or None where the line is damaged."""
    if not is_whole(line):
        return None
    key, value = loads(line[9:].decode("utf-8"))
    return tuple(key), value
