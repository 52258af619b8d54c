"""Numbers by name for millions of names: of each name 64 bits of its hash are kept, and not the name."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

_SLOTS = 1 << 10  # at first
_FULL = 0.6  # share of the slots that is used before there are twice as many; beyond it searches grow long
_NARROW = 2**32 - 1
ABSENT = -1


class Places:
    """A whole number from 0 by each name; 24 to 32 bytes a name on average, where a dictionary takes about 200.

    Two of n names share a hash with a chance of n² / 2^65: 3 in 10^8 for a million. Python draws the key of its hash
    of texts anew in each process, so nobody can make names that collide.
    """

    _hashes: array[int]
    _numbers: array[int]
    _mask: int

    def __init__(self) -> None:
        self._width = "I"  # as narrow as the numbers allow: lines of files mostly fit, places in them do not
        self._resize(_SLOTS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: Hashable) -> bool:
        return self.find(name) != ABSENT

    def find(self, name: Hashable) -> int:
        """The number of ``name``, :data:`ABSENT` where it has none."""
        wanted = hash(name) or 1  # 0 marks a free slot
        at = wanted & self._mask
        while found := self._hashes[at]:
            if found == wanted:
                return self._numbers[at]
            at = (at + 1) & self._mask
        return ABSENT

    def add(self, name: Hashable) -> None:
        """Note a name where the number does not matter."""
        self.put(name, 0)

    def put(self, name: Hashable, number: int) -> None:
        """Give ``name`` a number, in the place of the one that it has."""
        if number > _NARROW and self._width == "I":
            self._width, self._numbers = "q", array("q", self._numbers)
        if self._count >= _FULL * (self._mask + 1):
            self._grow()
        self._count += self._put(hash(name) or 1, number)

    def _put(self, wanted: int, number: int) -> bool:
        """Whether it is a new name."""
        at = wanted & self._mask
        while (found := self._hashes[at]) and found != wanted:
            at = (at + 1) & self._mask
        self._hashes[at], self._numbers[at] = wanted, number
        return not found

    def _resize(self, slots: int) -> None:
        self._hashes, self._numbers, self._mask = array("q", [0]) * slots, array(self._width, [0]) * slots, slots - 1

    def _grow(self) -> None:
        hashes, numbers = self._hashes, self._numbers
        self._resize(2 * len(hashes))
        for wanted, number in zip(hashes, numbers, strict=True):
            if wanted:
                self._put(wanted, number)


class Names:
    """Texts by number, in a few bytes beyond their own."""

    def __init__(self) -> None:
        self._all, self._ends = bytearray(), array("Q", [0])

    def add(self, name: str) -> int:
        """Its number."""
        self._all += name.encode("utf-8")
        self._ends.append(len(self._all))
        return len(self._ends) - 2

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self._all[self._ends[number] : self._ends[number + 1]].decode("utf-8")
