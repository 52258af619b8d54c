"""Names of records that no two share, found in a time that does not grow with how often a name was asked for."""

from __future__ import annotations


class FreshIds:
    """Gives out names once each.

    Attributes:
        seen: all that were given out.
    """

    def __init__(self) -> None:
        self.seen = set[str]()
        self._next: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """``wanted`` where it is free, else with ``+``, ``+2``, ``+3``, ... behind it.

        The counter of each name goes on where it stopped: n records of one name take n steps, not n squared.
        """
        ident, count = wanted, self._next.get(wanted, 0)
        while ident in self.seen:
            count += 1
            ident = f"{wanted}+" if count == 1 else f"{wanted}+{count}"
        self._next[wanted] = count
        self.seen.add(ident)
        return ident
