"""One row of numbers a prompt, kept as columns: eight bytes a number, where a dictionary takes a hundred."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rankalign.storage.places import Names

Row = dict[str, Any]


class Columns(Sequence[Row]):
    """Rows ``{"id": ..., name: number, ...}``, made when they are asked for.

    Args:
        absent: whether a number that a row lacks stands in it as None; else its name is left out.
    """

    def __init__(self, absent: bool = False) -> None:
        self._ids, self._absent = Names(), absent
        self._columns: dict[str, array[float]] = {}

    def add(self, ident: str, numbers: Mapping[str, float | None]) -> None:
        """One more row; names may come up in any of them."""
        count = self._ids.add(ident)
        for name in numbers:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan]) * count
        for name, column in self._columns.items():
            value = numbers.get(name)
            column.append(math.nan if value is None else value)

    @property
    def names(self) -> list[str]:
        """Names of the columns, in order of first sight."""
        return list(self._columns)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """(P,) a column; NaN where a row lacks it."""
        return np.frombuffer(self._columns[name], dtype=np.float64) if self._columns.get(name) else np.zeros(0)

    def known(self, name: str) -> NDArray[np.float64]:
        """The numbers of a column that there are."""
        column = self.numbers(name)
        return column[~np.isnan(column)]

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(at) for at in range(len(self))[index]]
        return self._row(range(len(self))[index])

    def _row(self, at: int) -> Row:
        row: Row = {"id": self._ids[at]}
        for name, column in self._columns.items():
            if not math.isnan(column[at]):
                row[name] = column[at]
            elif self._absent:
                row[name] = None
        return row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
