"""``--batch_by tokens``: another division of the same update, with the same gradient and fuller rows."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.errors import InputError
from rankalign.rows.tree import tree_tokens
from rankalign.training.examples import Example
from rankalign.training.online import plan as online_plan
from rankalign.training.packing import RowFill, pack
from rankalign.training.rank import RankTrainer
from tests.numerics.test_training import settings, toy_lists, trained


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 40, 150])
def test_rows_hold_everything_once_within_the_budget(count: int, multiple: int) -> None:
    draw = random.Random(count)
    items = [draw.randint(1, 60) for _ in range(count)] + [130] * (count > 3)
    rows = pack(items, sum, 100, multiple)
    assert sorted(item for row in rows for item in row) == sorted(items)
    assert len(rows) % multiple == 0
    assert all(sum(row) <= 100 or len(row) == 1 for row in rows)
    fewest = -(-sum(min(item, 100) for item in items) // 100)
    assert len(rows) <= -(-(fewest + 1) // multiple) * multiple  # first fit decreasing: 11/9 of the optimum, at worst
    if count > 3 * multiple:
        full = RowFill()
        full.add([sum(row) for row in rows if row], len(rows), 100)
        assert full.read()["row_fill"] > 0.95
        assert full.read() == {}


def least_rows(sizes: list[int], capacity: int) -> int:
    """No packing has fewer rows: the bound L2 of Martello and Toth 1990. Sizes above half a row share none, and what
    they leave holds only so much of the sizes from k up."""
    found = 0
    for k in {0, *(size for size in sizes if size <= capacity / 2)}:
        alone = [size for size in sizes if size > capacity - k]
        halves = [size for size in sizes if capacity / 2 < size <= capacity - k]
        small = sum(size for size in sizes if k <= size <= capacity / 2)
        left = len(halves) * capacity - sum(halves)
        found = max(found, len(alone) + len(halves) + max(0, -(-(small - left) // capacity)))
    return found


def most_fill(sizes: list[int], budget: int) -> float:
    """No packing is fuller, however long its longest row is."""
    rest = [size for size in sizes if size < budget]
    rooms = (capacity * least_rows(rest, capacity) for capacity in range(max(rest), budget + 1))
    return sum(sizes) / (sum(size for size in sizes if size >= budget) + min(rooms))


@pytest.mark.parametrize(("middle", "spread"), [(320, 70), (200, 100), (110, 50), (40, 30)])
def test_rows_are_as_few_and_as_full_as_any_packing_has_them(middle: int, spread: int) -> None:
    """The first are like best-of-n lists at a budget of 4096, a tenth as long: hardly two of them share a row."""
    draw = random.Random(middle)
    for _ in range(4):
        sizes = [max(5, round(draw.gauss(middle, spread))) for _ in range(64)]
        rows, full = pack(sizes, sum, 410), RowFill()
        full.add(list(map(sum, rows)), len(rows), 410)
        least = least_rows([size for size in sizes if size < 410], 410) + sum(size >= 410 for size in sizes)
        assert least <= len(rows) <= least + 1
        most, found = most_fill(sizes, 410), full.read()["row_fill"]
        assert most - 0.03 < found <= most


def test_even_rows_by_hand() -> None:
    # 24 tokens take three rows of ten; of eight each they are even. The 12 runs alone, whatever the budget.
    assert pack([5, 5, 4, 4, 3, 3], sum, 10) == [[5, 3], [5, 3], [4, 4]]
    assert pack([5, 12, 3], sum, 10) == [[12], [5, 3]]
    assert pack([5], sum, 10, 2) == [[5], []]
    full = RowFill()
    full.add([8, 8, 8], 3, 10)
    full.add([12, 8, 4], 4, 10)  # the fourth is another process's that has none
    assert full.read() == {"row_fill": (24 + 24) / (24 + 12 + 8 + 8 + 8)}


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("loss", ["rrhf", "dpo", "sft"])
def test_the_step_is_that_of_the_micro_batches(tmp_path: Path, loss: str, layout: str) -> None:
    examples = [Example(t, torch.randn(len(t.responses), dtype=torch.float64)) for t in toy_lists(11)]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    fixed: dict[str, Any] = {"loss": loss, "layout": layout, "learning_rate": 0.1, "logging_steps": 1, **sizes}
    drawn, expected = trained(tmp_path / "a", examples, token_budget=100, **fixed)
    even, found = trained(tmp_path / "b", examples, token_budget=100, batch_by="tokens", **fixed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert even.state.global_step == drawn.state.global_step == 4
    for ours, theirs in zip(even.state.log_history[:-1], drawn.state.log_history[:-1], strict=True):
        fill = ours.pop("row_fill")
        assert 0.5 < fill <= 1
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert even.meter.ledger is not None
    assert drawn.meter.ledger is not None
    assert even.meter.ledger.entries.keys() == drawn.meter.ledger.entries.keys()


def test_rows_of_an_update_are_few_and_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    real = RankTrainer.losses
    monkeypatch.setattr(
        RankTrainer, "losses", lambda self, model, some, meter: ran.append(list(some)) or real(self, model, some, meter)
    )
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_steps": 1}
    lists = toy_lists(16)
    trained(tmp_path, [Example(t) for t in lists], token_budget=150, batch_by="tokens", **sizes)
    tokens = [sum(tree_tokens(len(e.tokens.prompt), [*map(len, e.tokens.responses)]) for e in row) for row in ran]
    assert max(tokens) <= 150
    assert len(tokens) == 6  # lists of some 43 tokens: three a row
    assert min(tokens) > 0.9 * max(tokens)


def test_what_it_does_not_go_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown --batch_by 'words'"):
        settings(tmp_path, batch_by="words")
    config = settings(tmp_path, batch_by="tokens", train_sampling_strategy="sequential")
    with pytest.raises(InputError, match="leave batch_by out"):
        online_plan(config, 4, 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="works with one process or DDP"):
        settings(tmp_path, batch_by="tokens")


@pytest.mark.parametrize(
    ("name", "budget", "world", "least"),
    [("hh", 4096, 1, 0.99), ("hh", 4096, 4, 0.99), ("bon", 16384, 1, 0.98), ("bon", 16384, 2, 0.98)],
)
def test_real_lists_fill_their_rows(name: str, budget: int, world: int, least: float, data_kit: Path) -> None:
    """Sizes in characters a fourth, as a tokenizer would roughly have them; updates of 64 prompts."""
    sizes = _hh(data_kit) if name == "hh" else _bon(data_kit)
    random.Random(0).shuffle(sizes)
    full = RowFill()
    for start in range(0, len(sizes) - 63, 64):
        rows = pack(sizes[start : start + 64], sum, budget, world)
        full.add([sum(row) for row in rows if row], len(rows), budget)
    assert full.read()["row_fill"] > least


def _hh(kit: Path) -> list[int]:
    lines = (kit / "hh" / "helpful_pairs.train.jsonl").read_text().splitlines()
    return [sum(len(value) for value in json.loads(line).values() if isinstance(value, str)) // 4 for line in lines]


def _bon(kit: Path) -> list[int]:
    with gzip.open(kit / "bon" / "tulu2_13b_bon.rrhf.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    return [(len(str(row["query"])) + sum(map(len, row["responses"]))) // 4 for row in rows]
