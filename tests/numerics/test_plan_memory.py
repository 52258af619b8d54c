"""The memory that `rankalign plan` foresees and what a real `rankalign train` process takes: cells of the benchmark."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.plan_memory import CELLS, Cell, Found, data, line_of, make_wide, measure
from rankalign.models import load as models
from rankalign.models.default import NAME
from rankalign.storage.jsonl import read_rows

MODEL = not (models.cache_dir() / NAME).is_dir()
DEFAULT = [
    pytest.mark.weights,
    pytest.mark.skipif(MODEL, reason="the default model is not in the cache"),
]


def test_every_value_of_each_axis_stands_in_three_cells() -> None:
    axes = [field.name for field in dataclasses.fields(Cell) if field.name != "length"]
    seen = Counter((axis, getattr(cell, axis)) for cell in CELLS.values() for axis in axes)
    assert min(seen.values()) >= 3
    assert len(set(CELLS.values())) == len(CELLS) >= 20
    lengths = {cell.length for cell in CELLS.values()}
    assert min(lengths) == 64
    assert max(lengths) == 256


def test_lists_are_as_long_as_a_cell_says(tmp_path: Path) -> None:
    for cell in (CELLS[1], CELLS[12]):
        rows = [row for _, row in read_rows(data(tmp_path, cell))]
        sizes = [len(r.split() if cell.model == "default" else r) for row in rows for r in row["responses"]]
        assert {len(row["responses"]) for row in rows} == {cell.candidates}
        assert all(abs(size - cell.length) <= 2 for size in sizes)


@pytest.mark.parametrize(
    ("measured", "verdict"), [(100, "within 15 %"), (117, "within 15 %"), (119, "in the range"), (131, "**outside**")]
)
def test_a_row_says_how_near_it_came(measured: int, verdict: str) -> None:
    found = Found(foreseen=100 << 20, low=80 << 20, high=130 << 20, measured=measured << 20, cpu=7.2)
    assert line_of(CELLS[1], found).split(" | ")[-2:] == [verdict, "7 |"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=DEFAULT if CELLS[n].model == "default" else []) for n in (1, 2, 5, 6, 10, 16)]
)
def test_the_peak_lies_in_the_range_and_within_15_percent(number: int, tmp_path: Path) -> None:
    if CELLS[number].model == "wide":
        make_wide(tmp_path / "wide")
    found = measure(CELLS[number], tmp_path)
    print(line_of(CELLS[number], found))
    assert found.low <= found.measured <= found.high < 2 * found.low
    assert found.foreseen == pytest.approx(found.measured, rel=0.15)
