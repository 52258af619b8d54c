"""Soft-capped tree attention by FlexAttention against dense attention by definition, in float64.

The graph runs as it was written: what torch generates from it for a card never ran here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rankalign.rows import attention, flex
from rankalign.rows.attention import tree_attention
from rankalign.rows.flex import block_mask, flex_attention, visible
from rankalign.rows.tree import Forest, Prefix
from tests.gpu.test_flash_varlen import CASES, CUDA, Case, assert_same_gradients, dense_mask, forest_of, on_device

LONG: Case = ([150, 3, 260], [[140, 1, 90], [2], [130, 300]])  # several blocks of 128, some of them seen whole
TWO: Case = ([90, 3], [[60, 1], [70]])


@pytest.fixture(autouse=True)
def _any_type_and_no_program_left(monkeypatch: pytest.MonkeyPatch, any_type: None) -> Iterator[None]:
    monkeypatch.setattr(flex, "ANY_TYPE", True)
    yield
    torch._dynamo.reset()


def inputs(tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, n, tokens, 16, dtype=dtype).requires_grad_() for n in (heads, key_heads, key_heads)]


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (cap * torch.tanh(q @ k.transpose(2, 3) * scale / cap)).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("case", [*CASES, "two blocks"])
def test_output_and_gradients_are_those_of_dense_attention(case: str, window: int | None) -> None:
    forest = forest_of(CASES.get(case, TWO))
    host = inputs(forest.size, 4, 2)
    device = on_device(host)
    slope = torch.randn(1, forest.size, 4, 16, dtype=torch.float64)
    expected = capped(*host, dense_mask(forest, window), 0.3, 1.5)
    got = flex_attention(*device, forest, 0.3, 1.5, window)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-12)
    (expected * slope).sum().backward()
    (got * slope.to(CUDA)).sum().backward()
    assert_same_gradients(device, host)


@pytest.mark.parametrize("window", [None, 1, 3, 129, 200])
@pytest.mark.parametrize("prefix", [False, True])
def test_blocks_are_seen_whole_in_part_or_not_at_all(window: int | None, prefix: bool) -> None:
    """By counting the dense mask; the kernel never looks into a block that is called whole or empty."""
    whole = forest_of(([260], [[140, 1, 300]]) if prefix else LONG)
    forest = Forest(whole.trees, prefix=Prefix() if prefix else None)
    mask = dense_mask(whole, window)[forest.offset :]
    runs = visible(forest, window)
    keys = torch.arange(mask.shape[1])
    found = ((keys >= runs[0, :, None]) & (keys < runs[1, :, None])) | (
        (keys >= runs[2, :, None]) & (keys < runs[3, :, None])
    )
    assert torch.equal(found, mask)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 128, 0, -mask.shape[0] % 128))
    counts = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).sum((1, 3))
    blocks = block_mask(forest, window, torch.device("cpu"))
    assert torch.equal(listed(blocks.full_kv_num_blocks, blocks.full_kv_indices, counts), counts == 128 * 128)
    expected = (counts > 0) & (counts < 128 * 128)
    assert torch.equal(listed(blocks.kv_num_blocks, blocks.kv_indices, counts), expected)
    assert torch.equal(listed(blocks.q_num_blocks, blocks.q_indices, counts.t()), expected.t())
    assert torch.equal(blocks.mask_mod(0, 0, torch.arange(len(mask))[:, None], keys[None]), mask)


def listed(numbers: Any, indices: Any, like: Tensor) -> Tensor:
    marked = torch.zeros(like.shape, dtype=torch.bool)
    for row, (count, order) in enumerate(zip(numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        marked[row, order[:count]] = True
    return marked


@pytest.mark.parametrize("window", [None, 3])
def test_a_prompt_that_has_been_run_before_is_seen_and_collects_its_gradient(window: int | None) -> None:
    whole = forest_of(([5], [[4, 1, 6]]))
    host = inputs(whole.size, 4, 2)
    device = on_device(host)
    slope = torch.randn(1, whole.size, 4, 16, dtype=torch.float64)
    slope[:, :5] = 0
    (capped(*host, dense_mask(whole, window), 0.3, 1.5) * slope).sum().backward()
    branches = Forest(whole.trees, prefix=Prefix())
    got = flex_attention(device[0][:, :, 5:], *device[1:], branches, 0.3, 1.5, window)
    (got * slope[:, 5:].to(CUDA)).sum().backward()
    assert_same_gradients(device, host)


def test_rows_of_any_shape_and_window_are_one_program() -> None:
    """Compiled again for each list it would cost seconds a step; a cap of its own is a program of its own."""
    torch._dynamo.reset()
    counters.clear()
    for case in (TWO, *CASES.values()):
        for window in (None, 3):
            forest = forest_of(case)
            device = on_device(inputs(forest.size, 4, 2))
            flex_attention(*device, forest, 0.3, 1.5, window).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2


def test_it_goes_through_autograd_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a compiled kernel goes without a card: traced, differentiated and functionalised by AOTAutograd."""
    forest = forest_of(TWO)
    expected, traced = (on_device(inputs(forest.size, 4, 2)) for _ in range(2))
    flex_attention(*expected, forest, 0.3, 1.5).square().sum().backward()
    program = torch.compile(flex._flex_attention, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(flex, "_compiled", lambda: program)
    flex_attention(*traced, forest, 0.3, 1.5).square().sum().backward()
    assert_same_gradients(traced, [_host(t) for t in expected])


def _host(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu()
    copy.grad = tensor.grad.cpu()
    return copy


def test_which_kernel_takes_capped_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits this one, and a mask where heads are too small, weights are dropped, or numbers are wide."""
    monkeypatch.setattr(flex, "ANY_TYPE", False)
    calls: list[str] = []
    monkeypatch.setattr(attention, "flex_attention", lambda *args: calls.append("flex"))
    monkeypatch.setattr(attention, "masked_attention", lambda *args: calls.append("mask"))
    forest = forest_of(TWO)
    half, wide = (inputs(forest.size, 4, 2, dtype) for dtype in (torch.bfloat16, torch.float32))
    layer = torch.nn.Module()
    for tensors, more in ((half, {}), (half, {"dropout": 0.1}), (wide, {}), ([t[..., :8] for t in half], {})):
        tree_attention(layer, *on_device(tensors), forest=forest, softcap=1.5, **more)
    tree_attention(layer, *half, forest=forest, softcap=1.5)
    assert calls == ["flex", "mask", "mask", "mask", "mask"]
