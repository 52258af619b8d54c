"""Sinks and values of another size in ragged flash calls against attention by definition, in float64 and bfloat16."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rankalign.rows import attention, flash_varlen
from rankalign.rows.tree import Forest, Prefix
from tests.numerics.test_sinks import SIZES, along_trees, by_definition, forest_of, inputs, seen


@pytest.fixture(autouse=True)
def _any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_varlen, "ANY_TYPE", True)


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().to("cuda").requires_grad_() for t in tensors]


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "sinks"), [c for c in itertools.product(SIZES, (False, True)) if c != ("equal", False)]
)
def test_output_and_gradients_are_by_definition(
    sizes: str, sinks: bool, window: int | None, active: bool, any_type: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    ragged = attention.ragged_attention
    monkeypatch.setattr(attention, "ragged_attention", lambda *a: taken.append(1) or ragged(*a))
    forest = forest_of(prompts_first=True)
    host = inputs(forest.size, sizes, sinks)
    device = on_device(host)
    slope = torch.randn(1, forest.size, 6, SIZES[sizes][1], dtype=torch.float64)
    on = [[True, False, True], [False, False], [True, True]] if active else None
    for tree, row in zip(forest.trees, on or (), strict=False):
        for (a, b), some in zip(tree.responses, row, strict=True):
            slope[:, a:b] *= some
        slope[:, slice(*tree.prompt)] *= any(row)
    found, expected = along_trees(device, forest, window), by_definition(*(*host, None)[:4], seen(forest, window))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-12)
    forest.active = on
    (found * slope.to("cuda")).sum().backward()
    (expected * slope).sum().backward()
    for a, b in zip(device, host, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-11, atol=1e-11)
    assert taken


@pytest.mark.parametrize("window", [None, 3])
def test_a_prompt_that_has_been_run_before(window: int | None, any_type: None) -> None:
    whole = forest_of()
    one = Forest(whole.trees[:1])
    size = one.size
    host = [t[:, :, :size].detach().requires_grad_() if t.dim() > 1 else t for t in inputs(size, "equal", True)]
    device = on_device(host)
    start = one.trees[0].prompt[1]
    slope = torch.randn(1, size, 6, 8, dtype=torch.float64)
    slope[:, :start] = 0
    (by_definition(*host, seen(one, window)) * slope).sum().backward()
    record = torch.nn.Identity()
    prefix = Prefix(cache={record: (device[1][:, :, :start], device[2][:, :, :start])})
    branches = Forest(one.trees, prefix=prefix)
    q, k, v = (t[:, :, start:] for t in device[:3])
    found = attention.tree_attention(
        record, q, k, v, forest=branches, scaling=0.3, sliding_window=window, s_aux=device[3]
    )
    (found * slope[:, start:].to("cuda")).sum().backward()
    for a, b in zip(device, host, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 3])
def test_bfloat16_is_as_close_as_its_rounding(window: int | None) -> None:
    forest = forest_of(prompts_first=True)
    host = inputs(forest.size, "values narrower", True, torch.bfloat16)
    found = along_trees(on_device(host), forest, window)
    expected = by_definition(*(t.detach().double() for t in host), seen(forest, window))
    assert found.dtype == torch.bfloat16
    assert float((found.detach().cpu().double() - expected).norm() / expected.norm()) < 2**-7


def test_a_soft_cap_beside_sinks_does_not_go_through_flex(any_type: None) -> None:
    forest = forest_of(prompts_first=True)
    q, k, v, sinks = on_device(inputs(forest.size, "values wider", True))
    q, k = (torch.nn.functional.pad(t, (0, 8)) for t in (q, k))
    found = attention.tree_attention(torch.nn.Identity(), q, k, v, forest=forest, scaling=0.3, softcap=1e9, s_aux=sinks)
    expected = by_definition(*(t.cpu() for t in (q, k, v, sinks)), seen(forest, None))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
