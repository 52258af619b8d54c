"""Tree attention with sinks and with values of another size than keys against attention by definition, in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from rankalign.rows import attention
from rankalign.rows.attention import tree_attention
from rankalign.rows.tree import Forest, tree_row

PROMPTS, ANSWERS = (5, 1, 9), ((4, 2, 5), (3, 1), (7, 7))
SIZES = {"equal": (8, 8), "values narrower": (24, 16), "values wider": (8, 16)}


def forest_of(prompts_first: bool = False) -> Forest:
    answers = [[[9] * n for n in row] for row in ANSWERS]
    forest = tree_row([[7] * n for n in PROMPTS], answers, prompts_first=prompts_first).forest
    assert forest is not None
    return forest


def seen(forest: Forest, window: int | None) -> Tensor:
    """(tokens, tokens) by definition: on the query's path, not ahead, within the window."""
    tree, branch, position = (torch.full((forest.size,), -1) for _ in range(3))
    for i, some in enumerate(forest.trees):
        for n, (a, b) in enumerate([some.prompt, *some.responses]):
            tree[a:b], branch[a:b] = i, n
            position[a:b] = torch.arange(b - a) + (some.prompt[1] - some.prompt[0] if n else 0)
    ahead = position[None] - position[:, None]
    path = (tree[:, None] == tree[None]) & ((branch[None] == 0) | (branch[None] == branch[:, None]))
    return path & (ahead <= 0) & (ahead > -(window or forest.size))


def by_definition(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor) -> Tensor:
    """transformers' own of gpt-oss; without sinks, a softmax."""
    groups = q.shape[1] // k.shape[1]
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)[None, None]
    if sinks is not None:
        module = SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=False)
        return eager_attention_forward(module, q, k, v, bias, scaling=0.3)[0]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    return ((q @ k.transpose(2, 3) * 0.3 + bias).softmax(-1) @ v).transpose(1, 2)


def inputs(tokens: int, sizes: str, sinks: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    keys, values = SIZES[sizes]
    shapes = [(1, 6, tokens, keys), (1, 2, tokens, keys), (1, 2, tokens, values), *([(6,)] if sinks else [])]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def along_trees(tensors: list[Tensor], forest: Forest, window: int | None) -> Tensor:
    q, k, v, *sinks = tensors
    more = {"s_aux": sinks[0]} if sinks else {}
    return tree_attention(nn.Identity(), q, k, v, forest=forest, scaling=0.3, sliding_window=window, **more)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "sinks"), [c for c in itertools.product(SIZES, (False, True)) if c != ("equal", False)]
)
def test_output_and_gradients_are_by_definition(sizes: str, sinks: bool, window: int | None, active: bool) -> None:
    forest = forest_of()
    ours, theirs = inputs(forest.size, sizes, sinks), inputs(forest.size, sizes, sinks)
    slope = torch.randn(1, forest.size, 6, SIZES[sizes][1], dtype=torch.float64)
    on = [[True, False, True], [False, False], [True, True]] if active else None
    for tree, row in zip(forest.trees, on or (), strict=False):
        for (a, b), some in zip(tree.responses, row, strict=True):
            slope[:, a:b] *= some
        slope[:, slice(*tree.prompt)] *= any(row)
    found, expected = along_trees(ours, forest, window), by_definition(*(*theirs, None)[:4], seen(forest, window))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    forest.active = on
    (found * slope).sum().backward()
    (expected * slope).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 3])
def test_bfloat16_is_as_close_as_its_rounding(window: int | None) -> None:
    forest = forest_of()
    ours = inputs(forest.size, "values narrower", True, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in ours]
    found, expected = along_trees(ours, forest, window), by_definition(*exact, seen(forest, window))
    assert found.dtype == torch.bfloat16
    assert float((found.double() - expected).detach().norm() / expected.detach().norm()) < 2**-7
    found.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 2**-6


def test_a_soft_cap_beside_sinks_goes_by_a_mask() -> None:
    """No family has both yet; a mask serves any."""
    forest = forest_of()
    q, k, v, sinks = inputs(forest.size, "equal", True)
    found = tree_attention(nn.Identity(), q, k, v, forest=forest, scaling=0.3, softcap=1.5, s_aux=sinks)
    k, v = (t.repeat_interleave(3, 1) for t in (k, v))
    scores = (1.5 * torch.tanh(q @ k.transpose(2, 3) * 0.3 / 1.5)).masked_fill(~seen(forest, None), -torch.inf)
    wide = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, 6, forest.size, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(found, (wide @ v).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_which_kernel_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("path_attention", "masked_attention"):
        right = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, right=right, name=name, **kw: taken.append(name) or right(*a, **kw)
        )
    forest = forest_of()
    for window in (None, 3):
        along_trees(inputs(forest.size, "values narrower", True), forest, window)
    assert taken == ["path_attention", "masked_attention"]
