"""Losses of reward models against their formulas written out, and trlX's arithmetic on the same tensors."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.losses import reward as losses
from rankalign.losses.ranked import Ranked
from rankalign.models import tiny
from rankalign.training import reward as reward_module
from rankalign.training.examples import Example
from rankalign.training.reward import compare

EOS = 2


def ranked(rows: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> Ranked:
    """Lists as a loss reads them; what is outside the mask is NaN, and must not matter."""
    width = max(map(len, rows))
    full = torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64)
    graded = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in scores], dtype=torch.float64)
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return Ranked(full, torch.ones_like(full).long(), graded, mask)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def test_four_responses_by_hand() -> None:
    four = ranked([[0.3, 0.2, 0.1, 0.0]], [[4, 3, 2, 1]])
    assert losses.bradley_terry(four).item() == pytest.approx(0.6140, abs=5e-5)  # the mean over C(4, 2), taken once
    assert losses.bradley_terry(ranked([[0.3, 0.2]], [[2, 1]])).item() == pytest.approx(0.6444, abs=5e-5)


def test_bradley_terry_with_margin_and_centring_is_its_formula() -> None:
    rng = random.Random(3)
    rows = [[rng.gauss(0, 2) for _ in range(n)] for n in (2, 5, 4, 1)]
    scores = [[float(rng.randint(0, 3)) for _ in row] for row in rows]
    scores[2] = [1.0] * 4
    found = losses.bradley_terry(ranked(rows, scores), margin=0.7, center_rewards_coefficient=0.3)
    for value, r, s in zip(found.tolist(), rows, scores, strict=True):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if s[i] > s[j]]
        terms = [-log_sigmoid(r[i] - r[j] - 0.7 * (s[i] - s[j])) + 0.3 * (r[i] + r[j]) ** 2 for i, j in pairs]
        assert value == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-12)
    assert found[2] == found[3] == 0


def test_quality_is_the_distance_of_the_sigmoid_from_the_score() -> None:
    """OpenAssistant's regression: sigmoid and L1, score / 10; one axis by hand, several as their mean."""
    r, s = [[0.0, 2.0, -1.0], [3.0]], [[5.0, 9.0, 0.0], [10.0]]
    found = losses.quality(ranked(r, s))
    by_hand = [(0 + abs(1 / (1 + math.exp(-2)) - 0.9) + 1 / (1 + math.e)) / 3, 1 - 1 / (1 + math.exp(-3))]
    assert found.tolist() == pytest.approx(by_hand, abs=1e-12)
    scaled = losses.quality(ranked(r, [[3.0, 4.6, 1.0], [5.0]]), low=1, high=5)
    assert scaled.tolist() == pytest.approx(by_hand, abs=1e-12)
    lists = ranked(r, s)
    two = torch.stack([lists.logps, lists.logps + 1], 2).nan_to_num()
    scores = torch.stack([lists.scores, lists.scores], 2)
    each = [losses.axis_regression(two[..., k : k + 1], scores[..., k : k + 1], lists.mask) for k in (0, 1)]
    assert losses.axis_regression(two, scores, lists.mask).tolist() == pytest.approx(sum(each).div(2).tolist())  # type: ignore[union-attr]
    for wrong in ({"high": 4.0}, {"low": 3.0, "high": 2.0}):
        with pytest.raises(InputError, match=r"scale|must be below"):
            losses.quality(lists, **wrong)


def test_plackett_luce_is_the_product_of_choices() -> None:
    r, s = [0.4, -1.0, 2.0, 0.1], [2.0, 4.0, 1.0, 3.0]
    order, by_hand = [1, 3, 0, 2], 0.0
    for k, i in enumerate(order):
        by_hand += math.log(sum(math.exp(r[j]) for j in order[k:])) - r[i]
    assert losses.plackett_luce(ranked([r], [s])).item() == pytest.approx(by_hand, abs=1e-12)
    pair = ranked([[1.0, -0.5]], [[0, 1]])
    assert losses.plackett_luce(pair, center_rewards_coefficient=0.2).item() == pytest.approx(
        losses.bradley_terry(pair, center_rewards_coefficient=0.2).item(), abs=1e-12
    )


def test_losses_are_finite_far_out() -> None:
    for r, expected in (([1e3, -1e3], 0.0), ([-1e3, 1e3], 2e3)):
        lists = ranked([r], [[2, 1]])
        values = lists.logps.requires_grad_()
        square = torch.tensor([[[0, 0], [0, 0]]])
        for loss in (
            losses.bradley_terry(lists),
            losses.plackett_luce(lists),
            losses.per_token(lists, values[..., None], square, square + 1),
        ):
            assert loss.item() == pytest.approx(expected, abs=1e-9)
            assert torch.isfinite(torch.autograd.grad(loss.sum(), values)[0]).all()


def trlx(chosen: list[int], rejected: list[int], v_chosen: Tensor, v_rejected: Tensor) -> Tensor:
    """The pair loss of trlX's summarisation example, over padded rows whose padding is the end of sequence."""
    ends = [ids.index(EOS) if EOS in ids else len(ids) for ids in (chosen, rejected)]
    start = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
    part = slice(start, max(ends))
    return -torch.log(torch.sigmoid(v_chosen[part] - v_rejected[part])).mean()


def test_per_token_equals_trlx_on_the_same_tensors() -> None:
    torch.manual_seed(0)
    rows = [[5, 6, 7, 8, EOS, EOS], [5, 6, 9, EOS, EOS, EOS], [5, 6, 7, 8, 9, 4], [3, EOS, EOS, EOS, EOS, EOS]]
    scores = [2.0, 3.0, 1.0, 1.0]
    values = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    texts = [row[: row.index(EOS)] if EOS in row else row for row in rows]
    pairs = [(i, j) for i, j in itertools.permutations(range(4), 2) if scores[i] > scores[j]]
    by_hand = torch.stack([trlx(rows[i], rows[j], values[i], values[j]) for i, j in pairs]).mean()
    first = torch.tensor([[reward_module._first_difference(a, b) for b in texts] for a in texts])
    stop = torch.tensor([[max(len(a), len(b)) for b in texts] for a in texts])
    lists = ranked([[0.0] * 4], [scores])
    found = losses.per_token(lists, values[None], first[None], stop[None]).sum()
    assert found.item() == pytest.approx(by_hand.item(), abs=1e-12)
    mine, theirs = (torch.autograd.grad(x, values)[0] for x in (found, by_hand))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_per_token_with_one_token_is_bradley_terry() -> None:
    lists = ranked([[0.5, -1.0, 2.0]], [[1, 2, 3]])
    options = {"margin": 0.5, "center_rewards_coefficient": 0.1}
    start = torch.zeros(1, 3, 3).long()
    found = losses.per_token(lists, lists.logps[..., None], start, start + 1, **options)
    assert found.item() == pytest.approx(losses.bradley_terry(lists, **options).item(), abs=1e-12)


def test_compare_holds_the_last_value() -> None:
    lists = [Example(TokenList("a", [1], [[5, 6], [5, 7, 8]], [1, 0])), Example(TokenList("b", [1], [[9]], [0]))]
    config = tiny.build_tiny_reward_model().config
    pieces = [[torch.tensor([0.0, 1, 2]), torch.tensor([0.0, 3, 4, 5])], [torch.tensor([0.0, 7])]]
    traces, first, stop = compare(lists, pieces, config)
    assert traces.tolist() == [[[1, 2, 2], [3, 4, 5]], [[7, 7, 7], [0, 0, 0]]]
    assert first[0].tolist() == [[2, 1], [1, 3]]
    assert stop[0].tolist() == [[2, 3], [3, 3]]
