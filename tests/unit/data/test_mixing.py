"""Mixing and splitting: sizes by arithmetic, choices that any process makes alike, nothing lost in silence."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankalign.data.convert import convert
from rankalign.data.formats import Losses
from rankalign.data.mixing import Mixture, with_own_ids
from rankalign.data.records import CandidateSet, read, write
from rankalign.errors import InputError


def made(count: int, prefix: str = "p") -> list[CandidateSet]:
    return [CandidateSet(f"{prefix}{n}", f"{prefix} {n}?") for n in range(count)]


def put(path: Path, count: int, prefix: str = "p") -> Path:
    write(path, made(count, prefix))
    return path


def ids(path: Path) -> list[str]:
    return [record.id for record in read(path)]


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "limits", "available", "taken"),
    [
        ((), (), [10, 20], [10, 20]),
        ((), (5,), [10, 3], [5, 3]),
        ((), (5, 2), [10, 3], [5, 2]),
        ((1, 1), (), [10, 4], [4, 4]),
        ((0.7, 0.3), (), [100, 30], [70, 30]),
        ((0.1, 0.9), (), [300, 27], [3, 27]),
        ((2, 1), (), [10, 100], [10, 5]),
        ((1, 1), (3, 100), [10, 10], [3, 3]),
        ((1, 2), (), [10, 0], [0, 0]),
    ],
)
def test_sizes(weights: tuple[float, ...], limits: tuple[int, ...], available: list[int], taken: list[int]) -> None:
    assert Mixture(weights, limits).sizes(available) == taken


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 20)), min_size=1, max_size=4))
def test_a_mixture_has_its_shares_and_cannot_be_larger(sources: list[tuple[int, int]]) -> None:
    available, weights = [count for count, _ in sources], [weight for _, weight in sources]
    sizes = Mixture(tuple(weights)).sizes(available)
    assert all(size <= count for size, count in zip(sizes, available, strict=True))
    # One source is used up, and the others are short of its share by less than one record.
    used_up = [i for i, size in enumerate(sizes) if size == available[i]]
    assert used_up
    unit = min(count / weight for count, weight in zip(available, weights, strict=True))
    assert all(abs(size - unit * weight) < 1 for size, weight in zip(sizes, weights, strict=True))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"weights": (1.0, 0.0)}, "positive"),
        ({"weights": (float("nan"),)}, "positive"),
        ({"limits": (0,)}, "at least 1"),
        ({"test_size": 1.0}, "below 1"),
        ({"test_size": -0.1}, "below 1"),
    ],
)
def test_senseless_numbers_are_refused(bad: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Mixture(**bad)


def test_as_many_weights_as_sources() -> None:
    with pytest.raises(InputError, match="2 sources need as many weights, got 3"):
        Mixture((1, 2, 3)).sizes([5, 5])


# --- what is taken -----------------------------------------------------------------------------------------------


def test_what_is_taken_keeps_its_order_and_what_is_not_is_counted() -> None:
    losses = Losses()
    taken = [record.id for record in Mixture(limits=(4, 2)).take([made(10, "a"), made(3, "b")], losses)]
    assert taken == sorted(taken)
    assert [ident[0] for ident in taken] == ["a"] * 4 + ["b"] * 2
    assert losses.counts == {"records beyond a source's weight or limit": 7}


def test_a_larger_limit_holds_the_smaller_and_another_seed_takes_others() -> None:
    small, large, other = (
        {record.id for record in Mixture(limits=(limit,), seed=seed).take([made(100)], Losses())}
        for limit, seed in ((10, 0), (30, 0), (10, 1))
    )
    assert small < large
    assert small != other


def test_every_record_is_as_likely_as_any_other() -> None:
    seeds, drawn = range(400), [0] * 10
    for seed in seeds:
        for record in Mixture(limits=(3,), seed=seed).take([made(10)], Losses()):
            drawn[int(record.id[1:])] += 1
    # Chi-squared with 9 degrees of freedom is above 27.9 once in a thousand; drawing without return only lowers it.
    mean = len(seeds) * 3 / 10
    assert sum((count - mean) ** 2 / mean for count in drawn) < 27.9


# --- splits ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9]), st.integers(0, 5))
def test_a_split_has_the_size_asked_for(count: int, share: float, seed: int) -> None:
    train, test = Mixture(test_size=share, seed=seed).split(made(count))
    assert len(test) == max(1, round(share * count))
    assert sorted(r.id for r in (*train, *test)) == sorted(r.id for r in made(count))


def test_records_of_one_prompt_stay_together() -> None:
    records = [CandidateSet(f"{n}", f"Question  {n % 5}?" if n % 2 else f"question {n % 5}?") for n in range(40)]
    train, test = Mixture(test_size=0.2).split(records)
    sides = [{str(record.prompt).lower().replace("  ", " ") for record in side} for side in (train, test)]
    assert sides[0].isdisjoint(sides[1])
    assert len(test) == 8


def test_a_larger_test_part_holds_the_smaller() -> None:
    parts = [{r.id for r in Mixture(test_size=share).split(made(50))[1]} for share in (0.1, 0.3)]
    assert parts[0] < parts[1]


# --- through convert ---------------------------------------------------------------------------------------------

SPLIT = (
    "import sys; from rankalign.data.convert import convert; from rankalign.data.mixing import Mixture;"
    "convert(sys.argv[1:3], sys.argv[3], mixture=Mixture((2, 1), (), 0.25, 7))"
)


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    sources = [put(tmp_path / "a.jsonl", 30, "a"), put(tmp_path / "b.jsonl", 30, "b")]
    digests = set()
    for hash_seed in ("1", "2"):
        target = tmp_path / hash_seed / "out.jsonl"
        subprocess.run(
            [sys.executable, "-c", SPLIT, *map(str, sources), str(target)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        parts = [target, target.with_name("out.test.jsonl")]
        digests.add(tuple(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts))
        assert [len(ids(part)) for part in parts] == [34, 11]
    assert len(digests) == 1


def test_sources_of_several_formats_become_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "q", "responses": ["a", "b"], "scores": [1, 2]}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    report = convert([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out.jsonl")
    assert (report["read"], report["written"]) == (2, 2)
    assert ids(tmp_path / "out.jsonl") == ["a-000001", "b-000001"]


def test_records_of_two_sources_never_share_an_id(tmp_path: Path) -> None:
    sources = [put(tmp_path / name / "set.jsonl", 2) for name in ("a", "b", "c")]
    convert(sources, tmp_path / "out.jsonl")
    assert ids(tmp_path / "out.jsonl") == ["p0", "p1", "set/p0", "set/p1", "set/p0+", "set/p1+"]
    renamed = [list(source) for source in with_own_ids([("f.x", made(2)), ("g.y.z", made(2))])]
    assert [[record.id for record in source] for source in renamed] == [["p0", "p1"], ["g/p0", "g/p1"]]


def test_the_command_mixes_and_splits(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", 20, "a"), put(tmp_path / "b.jsonl", 8, "b")
    command = "convert a.jsonl b.jsonl out.jsonl.gz --weights 3 1 --limits 12 --test-size 0.25 --seed 3 --json"
    done = subprocess.run(
        [sys.executable, "-m", "rankalign", *command.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert '"written": 12' in done.stdout
    assert '"written_test": 4' in done.stdout
    assert (len(ids(tmp_path / "out.jsonl.gz")), len(ids(tmp_path / "out.test.jsonl.gz"))) == (12, 4)
