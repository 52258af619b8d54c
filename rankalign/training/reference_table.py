"""Sums of log-probabilities by the content that they are of: a file that grows at its end and is mapped, not read."""

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

# 48 bytes a row: a key of 32, of which the first 8 sort the index; the sum; and a check over both, since the rows that
# were last written when the power went may have any bytes.
ROW = np.dtype([("head", "<u8"), ("tail", "V24"), ("sum", "<f8"), ("check", "<u8")])
MAPPED_AT = 1 << 16  # own new rows, held by key, from which on they are looked up in the file like all others


class ReferenceTable:
    """Sums by 32-byte keys. Any number of processes may read and append at a time.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new: dict[bytes, float] = {}
        self._map()

    def _map(self) -> None:
        """Index what is there now: 16 bytes of memory a row."""
        count = self.path.stat().st_size // ROW.itemsize if self.path.exists() else 0
        self._rows = np.memmap(self.path, ROW, "r", shape=(count,)) if count else np.empty(0, ROW)
        self._order = np.argsort(self._rows["head"], kind="stable")
        self._heads = np.asarray(self._rows["head"])[self._order]

    def __len__(self) -> int:
        return len(self._rows) + len(self._new)

    def find(self, keys: Sequence[bytes]) -> list[float | None]:
        """The sum of each key, None where there is none that is whole."""
        heads = np.frombuffer(b"".join(key[:8] for key in keys), "<u8")
        places = np.searchsorted(self._heads, heads)
        found = zip(keys, places.tolist(), strict=True)
        return [self._new.get(key, None) if key in self._new else self._at(key, place) for key, place in found]

    def _at(self, key: bytes, place: int) -> float | None:
        head = int.from_bytes(key[:8], "little")
        while place < len(self._heads) and self._heads[place] == head:
            row = self._rows[self._order[place]]
            if row.tobytes()[:32] == key and int(row["check"]) == _check(key, float(row["sum"])):
                return float(row["sum"])
            place += 1
        return None

    def add(self, sums: dict[bytes, float]) -> None:
        """Append rows.

        Raises:
            InputError: the file cannot be written.
        """
        block = b"".join(key + struct.pack("<dQ", value, _check(key, value)) for key, value in sums.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as out:
                fcntl.flock(out, fcntl.LOCK_EX)
                size = os.fstat(out.fileno()).st_size
                os.ftruncate(out.fileno(), size - size % ROW.itemsize)  # what a writer that was killed left of a row
                write_all(out.fileno(), block)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self._new.update(sums)
        if len(self._new) >= MAPPED_AT:
            self._new = {}
            self._map()


def _check(key: bytes, value: float) -> int:
    return int.from_bytes(hashlib.blake2b(key + struct.pack("<d", value), digest_size=8).digest(), "little")
