"""Lists into rows of few tokens' difference, so that no row runs half empty and no process waits for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Size = Callable[[Sequence[T]], int]
"""Tokens of the row that some lists fill; it grows with every list."""


def pack(items: Sequence[T], size: Size[T], budget: int, multiple: int = 1) -> list[list[T]]:
    """As few rows as the budget allows, and these as even as best fit makes them; the largest first.

    Args:
        items: what goes into the rows, each whole.
        size: of a row.
        budget: the most a row may take; what takes more on its own has a row for itself.
        multiple: how many processes share the rows: each has as many, the last of some of them without an item where
            there are fewer items than rows.

    Returns:
        ``k * multiple`` rows, of which every one with an item keeps to the budget or has one item.
    """
    alone = [[item] for item in items if size([item]) >= budget]
    rest = sorted((item for item in items if size([item]) < budget), key=lambda item: -size([item]))
    fewest = best_fit(rest, size, budget)
    count = -(-(len(alone) + len(fewest)) // multiple) * multiple - len(alone)
    low, high, best = (max((size([item]) for item in rest), default=0), budget, fewest)
    # The least capacity for which so many rows are enough. Best fit is no monotone function of it, but nearly.
    while low < high:
        middle = (low + high) // 2
        found = best_fit(rest, size, middle)
        if len(found) <= count:
            high, best = middle, found
        else:
            low = middle + 1
    rows = alone + best
    rows += [[] for _ in range(-len(rows) % multiple)]
    return sorted(rows, key=lambda row: -size(row) if row else 0)


def best_fit(items: Sequence[T], size: Size[T], capacity: int) -> list[list[T]]:
    """Each item, in the order given, into the row that it leaves the least room in, or into a new one."""
    rows: list[list[T]] = []
    taken: list[int] = []
    for item in items:
        sizes = [size([*row, item]) for row in rows]
        fitting = [i for i, tokens in enumerate(sizes) if tokens <= capacity]
        if fitting:
            fullest = max(fitting, key=lambda i: taken[i])
            rows[fullest].append(item)
            taken[fullest] = sizes[fullest]
        else:
            rows.append([item])
            taken.append(size([item]))
    return rows


class RowFill:
    """How full rows were since the last reading: the share of their tokens in what they would hold were all as long as
    the longest that keeps to the budget. One that exceeds it has a single list, and counts as full."""

    def __init__(self) -> None:
        self.tokens, self.room = 0, 0

    def add(self, sizes: Sequence[int], rows: int, budget: int) -> None:
        """Take in one update: the tokens of its rows that have any, and how many rows there are over all processes."""
        top = max((size for size in sizes if size <= budget), default=0)
        self.tokens += sum(sizes)
        self.room += sum(max(size, top) for size in sizes) + top * (rows - len(sizes))

    def read(self) -> dict[str, float]:
        """``row_fill``, from 0 to 1; nothing where no row was packed."""
        found = {"row_fill": self.tokens / self.room} if self.room else {}
        self.tokens = self.room = 0
        return found
