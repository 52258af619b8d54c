"""Names of records that no two share, found in a time that does not grow with how often a name was asked for."""

from __future__ import annotations

from rankalign.errors import Line, on_line
from rankalign.storage.places import ABSENT, Places


class FreshIds:
    """Gives out names once each.

    Attributes:
        seen: all that were given out.
    """

    def __init__(self) -> None:
        self.seen = Places()
        self._next: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """``wanted`` where it is free, else with ``+``, ``+2``, ``+3``, ... behind it.

        The counter of each name goes on where it stopped: n records of one name take n steps, not n squared.
        """
        if wanted not in self.seen:
            self.seen.add(wanted)
            return wanted
        ident, count = wanted, self._next.get(wanted, 0)
        while ident in self.seen:
            count += 1
            ident = f"{wanted}+" if count == 1 else f"{wanted}+{count}"
        self._next[wanted] = count
        self.seen.add(ident)
        return ident


_KIND = 2  # bits behind a place's number: what it counts
_LINE, _ELEMENT, _SHARD = range(3)
_OF_SHARD = 40  # bits of a line's number where the shard's number stands before it


class SeenIds:
    """Where each id of a file stood first, in some 32 bytes an id."""

    def __init__(self) -> None:
        self._places = Places()
        self._shards: dict[str, int] = {}

    def earlier(self, ident: str) -> str:
        """Where ``ident`` stood before, in words (``on line 3``); empty where it did not."""
        packed = self._places.find(ident)
        if packed == ABSENT:
            return ""
        number, kind = packed >> _KIND, packed & (1 << _KIND) - 1
        if kind == _SHARD:
            shard, line = number >> _OF_SHARD, number & (1 << _OF_SHARD) - 1
            return on_line(Line.of(line, file=list(self._shards)[shard]))
        return on_line(number if kind == _LINE else Line.of(0, number))

    def add(self, ident: str, line: int) -> None:
        """Note that ``ident`` stands on ``line``."""
        number, kind = int(line), _LINE
        if isinstance(line, Line) and line.file:
            number, kind = self._shards.setdefault(line.file, len(self._shards)) << _OF_SHARD | number, _SHARD
        elif isinstance(line, Line) and line.element:
            number, kind = line.element, _ELEMENT
        self._places.put(ident, number << _KIND | kind)
