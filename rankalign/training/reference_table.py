"""Log-probabilities by the content that they are of: a file that grows at its end and is mapped, not read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rankalign.errors import InputError
from rankalign.storage.files import write_all

MAPPED_AT = 1 << 16  # own new rows, held by key, from which on they are looked up in the file like all others


Values = tuple[float, ...]


def row_of(width: int) -> np.dtype[np.void]:
    """40 bytes a row and 8 a value: a key of 32, of which the first 8 sort the index; the values; and a check over
    both, since the rows that were last written when the power went may have any bytes."""
    return np.dtype([("head", "<u8"), ("tail", "V24"), ("values", "<f8", (width,)), ("check", "<u8")])


class ReferenceTable:
    """Numbers by 32-byte keys. Any number of processes may read and append at a time.

    Args:
        path: the file, which need not be there yet.
        width: how many numbers a key has.
    """

    def __init__(self, path: Path, width: int = 1) -> None:
        self.path, self.row = path, row_of(width)
        self._numbers = struct.Struct(f"<{width}d")
        self._new: dict[bytes, Values] = {}
        self._map()

    def _map(self) -> None:
        """Index what is there now: 16 bytes of memory a row."""
        count = self.path.stat().st_size // self.row.itemsize if self.path.exists() else 0
        self._rows = np.memmap(self.path, self.row, "r", shape=(count,)) if count else np.empty(0, self.row)
        self._order = np.argsort(self._rows["head"], kind="stable")
        self._heads = np.asarray(self._rows["head"])[self._order]

    def __len__(self) -> int:
        return len(self._rows) + len(self._new)

    def find(self, keys: Sequence[bytes]) -> list[Values | None]:
        """The values of each key, None where there is none that is whole."""
        heads = np.frombuffer(b"".join(key[:8] for key in keys), "<u8")
        places = np.searchsorted(self._heads, heads)
        found = zip(keys, places.tolist(), strict=True)
        return [self._new.get(key, None) if key in self._new else self._at(key, place) for key, place in found]

    def _at(self, key: bytes, place: int) -> Values | None:
        head = int.from_bytes(key[:8], "little")
        while place < len(self._heads) and self._heads[place] == head:
            row = self._rows[self._order[place]].tobytes()
            found, numbers, check = row[:32], row[32:-8], row[-8:]
            if found == key and check == _check(key, numbers):
                return self._numbers.unpack(numbers)
            place += 1
        return None

    def add(self, values: dict[bytes, Values]) -> None:
        """Append rows.

        Raises:
            InputError: the file cannot be written.
        """
        packed = ((key, self._numbers.pack(*numbers)) for key, numbers in values.items())
        block = b"".join(key + numbers + _check(key, numbers) for key, numbers in packed)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as out:
                fcntl.flock(out, fcntl.LOCK_EX)
                size = os.fstat(out.fileno()).st_size
                part = size % self.row.itemsize  # what a writer that was killed left of a row
                os.ftruncate(out.fileno(), size - part)
                write_all(out.fileno(), block)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self._new.update(values)
        if len(self._new) >= MAPPED_AT:
            self._new = {}
            self._map()


def _check(key: bytes, numbers: bytes) -> bytes:
    return hashlib.blake2b(key + numbers, digest_size=8).digest()
