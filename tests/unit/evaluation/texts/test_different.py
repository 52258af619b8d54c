"""Counts of different things, common subsequences, columns, resampled groups: each against its plain form."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rankalign.evaluation import statistics
from rankalign.evaluation.columns import Columns
from rankalign.evaluation.texts import different
from rankalign.evaluation.texts.lexical import rouge
from rankalign.evaluation.texts.numbered import different as different_keys
from rankalign.evaluation.texts.numbered import hashed, runs
from rankalign.evaluation.texts.variety import _rouge_l, common_subsequence


@pytest.mark.parametrize("held", [10, 100, 10**6])
def test_different_things_are_counted_exactly(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(different, "_HELD", held)
    draw, counted, known = random.Random(held), different.Different(), set[tuple[str, int]]()
    for _ in range(400):
        things = [("w", draw.randrange(3000)) for _ in range(draw.randrange(30))]
        counted.add(np.array([hash(thing) for thing in things], dtype=np.int64))
        known.update(things)
    assert counted.count() == len(known)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_runs_are_different_where_their_words_are(size: int) -> None:
    draw = random.Random(size)
    for _ in range(200):
        text = draw.choices("abcde", k=draw.randrange(30))
        tuples = [tuple(text[at : at + size]) for at in range(len(text) - size + 1)]
        keys = runs(hashed(text), size)
        assert len(keys) == len(tuples)
        assert len(set(zip(keys.tolist(), tuples, strict=True))) == len(set(tuples)) == different_keys(keys)


def test_a_common_subsequence_is_as_long_as_the_table_says() -> None:
    draw = random.Random(1)
    for _ in range(200):
        one, other = (draw.choices("abcd", k=draw.randrange(1, 90)) for _ in range(2))
        table = [0] * (len(other) + 1)
        for mine in one:
            before = list(table)
            for at, theirs in enumerate(other):
                table[at + 1] = before[at] + 1 if mine == theirs else max(before[at + 1], table[at])
        assert common_subsequence(one, other) == table[-1]
        expected = rouge([" ".join(other)], [[" ".join(one)]])["rougeL"][0]
        assert _rouge_l(one, other) == expected


def test_intervals_of_several_columns_are_those_of_each() -> None:
    draw = np.random.default_rng(3)
    columns = {"x": draw.normal(size=50), "short": draw.normal(size=7), "y": draw.normal(size=50), "none": np.zeros(50)}
    found = statistics.mean_intervals(columns, draws=999, seed=4)
    assert list(found) == list(columns)
    for name, values in columns.items():
        assert found[name] == statistics.mean_interval(values, draws=999, seed=4)  # to the bit


def test_columns_are_the_rows() -> None:
    rows = [{"id": "a", "x": 1.5}, {"id": "é", "x": None, "y": 2}, {"id": "c"}]
    with_none, without = Columns(absent=True), Columns()
    for row in rows:
        numbers = {name: value for name, value in row.items() if name != "id"}
        for columns in (with_none, without):
            columns.add(str(row["id"]), numbers)  # type: ignore[arg-type]
    assert without == [{"id": "a", "x": 1.5}, {"id": "é", "y": 2.0}, {"id": "c"}]
    assert with_none[2] == {"id": "c", "x": None, "y": None}
    assert without.known("y").tolist() == [2.0]
    assert len(without[1:]) == 2


def test_resampled_groups_have_the_width_of_resampled_prompts() -> None:
    """A mean's interval is 2 * 1.96 standard errors wide; with 45,001 prompts one is in no group of three."""
    values = np.random.default_rng(2).exponential(size=45_001) + 5
    found = statistics.mean_interval(values, draws=4000)
    width = 2 * 1.959964 * values.std() / math.sqrt(len(values))
    assert found.interval.high - found.interval.low == pytest.approx(width, rel=0.05)
    assert (found.interval.high + found.interval.low) / 2 == pytest.approx(values.mean(), abs=0.05 * width)
    ones = statistics.ratio_interval(values, np.ones_like(values), draws=4000)
    assert ones.interval.low == pytest.approx(found.interval.low, abs=0.05 * width)
