"""Ragged tree attention against dense attention by definition, in float64, to the last digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankalign.rows import flash_varlen
from rankalign.rows.flash_varlen import ragged_attention
from rankalign.rows.tree import Forest, Prefix, tree_row

CUDA = torch.device("cuda")
Case = tuple[list[int], list[list[int]]]  # lengths of prompts, and of their responses
CASES: dict[str, Case] = {
    "one prompt, one response": ([3], [[3]]),
    "ragged lists": ([5, 1, 9], [[4, 2, 5], [3], [7, 7]]),
    "responses of one token leave nothing in the row": ([4, 3], [[1, 6, 1], [1]]),
    "single tokens everywhere": ([1, 1], [[2], [2]]),
    "one token of one response, none of the other": ([3, 2], [[2], [1]]),
    "no responses": ([4, 2], [[], [1]]),
    "eight prompts, six responses": ([7, 5, 8, 3, 9, 4, 6, 2], [[4, 5, 6, 7, 3, 2]] * 8),
}


def forest_of(case: Case) -> Forest:
    prompts, responses = ([[7] * n for n in case[0]], [[[9] * n for n in some] for some in case[1]])
    forest = tree_row(prompts, responses, prompts_first=True).forest
    assert forest is not None
    return forest


def dense_mask(forest: Forest, window: int | None) -> Tensor:
    """(tokens, tokens) by definition: the key is on the query's path, not ahead, and within the window."""
    tree, branch, position = (torch.full((forest.size,), -1) for _ in range(3))
    for i, some in enumerate(forest.trees):
        for n, (a, b) in enumerate([some.prompt, *some.responses]):
            tree[a:b], branch[a:b] = i, n
            position[a:b] = torch.arange(b - a) + (some.prompt[1] - some.prompt[0] if n else 0)
    ahead = position[None] - position[:, None]
    path = (tree[:, None] == tree[None]) & ((branch[None] == 0) | (branch[None] == branch[:, None]))
    return path & (ahead <= 0) & (ahead > -(window or forest.size))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, n, tokens, 8, dtype=dtype).requires_grad_() for n in (heads, key_heads, key_heads)]


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().to(CUDA).requires_grad_() for t in tensors]


def assert_same_gradients(device: list[Tensor], host: list[Tensor]) -> None:
    for a, b in zip(device, host, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_dense_attention(
    case: str, window: int | None, heads: tuple[int, int], any_type: None
) -> None:
    forest = forest_of(CASES[case])
    deep = window if window and any(tree.depth > window for tree in forest.trees) else None
    host = inputs(forest.size, *heads)
    device = on_device(host)
    slope = torch.randn(1, forest.size, heads[0], 8, dtype=torch.float64)
    expected, got = dense(*host, dense_mask(forest, window), 0.3), ragged_attention(*device, forest, 0.3, deep)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-12)
    (expected * slope).sum().backward()
    (got * slope.to(CUDA)).sum().backward()
    assert_same_gradients(device, host)


@pytest.mark.parametrize("active", [[[True, False, True], [False], [False, True]], [[False] * 3, [True], [False] * 2]])
def test_rows_that_no_gradient_reaches_are_left_out_exactly(
    active: list[list[bool]], any_type: None, watch: Any
) -> None:
    forest = forest_of(CASES["ragged lists"])
    host = inputs(forest.size, 6, 2)
    device = on_device(host)
    slope = torch.zeros(1, forest.size, 6, 8, dtype=torch.float64)
    for tree, on in zip(forest.trees, active, strict=True):
        spans = [tree.prompt] * any(on) + [r for r, yes in zip(tree.responses, on, strict=True) if yes]
        for a, b in spans:
            slope[:, a:b] = torch.randn(b - a, 6, 8, dtype=torch.float64)
    (dense(*host, dense_mask(forest, None), 0.3) * slope).sum().backward()
    got = ragged_attention(*device, forest, 0.3)
    forest.active = active
    (got * slope.to(CUDA)).sum().backward()
    assert_same_gradients(device, host)
    calls = [shapes for name, _, shapes in _backward_of(device, forest, slope, watch) if "flash" in name]
    assert all(len(shapes[1]) and shapes[1][0] < forest.size for shapes in calls)


def _backward_of(device: list[Tensor], forest: Forest, slope: Tensor, watch: Any) -> Any:
    got = ragged_attention(*device, forest, 0.3)
    with watch() as log:
        (got * slope.to(CUDA)).sum().backward()
    return log.kernels


@pytest.mark.parametrize("window", [None, 3])
def test_a_prompt_that_has_been_run_before_is_seen_and_collects_its_gradient(
    window: int | None, any_type: None
) -> None:
    whole = forest_of(([5], [[4, 1, 6]]))
    host = inputs(whole.size, 6, 2)
    device = on_device(host)
    slope = torch.randn(1, whole.size, 6, 8, dtype=torch.float64)
    slope[:, :5] = 0
    (dense(*host, dense_mask(whole, window), 0.3) * slope).sum().backward()
    branches = Forest(whole.trees, prefix=Prefix())
    got = ragged_attention(device[0][:, :, 5:], *device[1:], branches, 0.3, window)
    (got * slope[:, 5:].to(CUDA)).sum().backward()
    assert_same_gradients(device, host)


@pytest.mark.parametrize("window", [None, 3])
def test_launches_do_not_grow_with_the_row_and_nothing_waits(window: int | None, watch: Any) -> None:
    counts = []
    for case in ("ragged lists", "eight prompts, six responses"):
        forest = forest_of(CASES[case])
        flash_varlen.prepare(forest, CUDA, [3])
        device = on_device(inputs(forest.size, 4, 2, torch.bfloat16))
        with watch() as log:
            ragged_attention(*device, forest, 0.3, window).sum().backward()
        counts.append(len(log.kernels))
        assert not log.waits
        assert not log.uploads
    assert counts[0] == counts[1]


@pytest.mark.parametrize("window", [None, 3])
def test_bfloat16_is_as_close_as_its_rounding(window: int | None) -> None:
    forest = forest_of(CASES["eight prompts, six responses"])
    host = inputs(forest.size, 4, 2, torch.bfloat16)
    expected = dense(*(t.detach().double() for t in host), dense_mask(forest, window), 0.3)
    got = ragged_attention(*on_device(host), forest, 0.3, window)
    assert got.dtype == torch.bfloat16
    assert float((got.detach().cpu().double() - expected).abs().max()) < 2**-6
