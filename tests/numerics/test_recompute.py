"""What backward computes again is the same to the bit, and is not kept meanwhile."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from rankalign.rows import recipes as recompute
from rankalign.rows import trunk
from rankalign.rows.logps import list_logps
from tests.numerics.test_logps import FAMILIES, adapted, build, gradients, largest_error, lists, weigh


class Tensors:
    """Tensors that are kept at this moment, each storage once."""

    def __init__(self) -> None:
        self.holders = weakref.WeakSet()

    def sizes(self, model: nn.Module | None = None) -> list[int]:
        """Bytes of each, the model's weights left out."""
        weights = {p.untyped_storage()._cdata for p in model.parameters()} if model is not None else set()
        storages = {h.tensor.untyped_storage()._cdata: h.tensor.untyped_storage().nbytes() for h in self.holders}
        return sorted(size for storage, size in storages.items() if storage not in weights)


@pytest.fixture
def kept(monkeypatch):
    tensors = Tensors()

    class Noted(recompute._Kept):
        def __init__(self, tensor):
            super().__init__(tensor)
            tensors.holders.add(self)

    monkeypatch.setattr(recompute, "_Kept", Noted)
    return tensors


def run(model, layout: str = "tree", autocast: bool = False) -> dict[str, torch.Tensor]:
    prompts, responses = lists()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        values = list_logps(model, prompts, responses, layout=layout)
    return gradients(model, weigh(values))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_to_the_bit(monkeypatch, name, layout, autocast):
    model = build(name).float()
    ours = run(model, layout, autocast)
    monkeypatch.setattr(trunk, "cheap_again", lambda *_: nullcontext())
    for name, gradient in run(model, layout, autocast).items():
        assert torch.equal(gradient, ours[name])


def test_a_llama_layer_keeps_its_matrix_products_and_residuals(kept):
    model, (prompts, responses) = build("llama").float(), lists()
    values = list_logps(model, prompts, responses, layout="tree")
    row = 4 * (sum(map(len, prompts)) + sum(len(r) - 1 for some in responses for r in some))
    found = Counter(size / row for size in kept.sizes(model) if size % row == 0)
    # Two layers: residual before each norm, query, result of attention; key, value; gate, up. Then the last residual,
    # and what is small: log-sum-exps of 4 heads, mean squares, angles, which both layers share.
    assert (found[16], found[8], found[24]) == (2 * 4 + 1, 2 * 2, 2 * 2)
    assert max(set(found) - {16, 8, 24}) <= 4
    del values


def test_frozen_layers_keep_no_inputs(kept):
    model, (prompts, responses) = adapted(["query_key_value"]), lists()
    values = list_logps(model, prompts, responses, layout="tree")
    inner = [h for h in kept.holders if h.tensor.shape[-1] == 24 and h.tensor.dim() == 3]
    # What the activation of the last MLP starts from; the first runs beside the first adapter and needs no gradient.
    assert len({h.tensor.untyped_storage()._cdata for h in inner}) == 1
    del values


def test_sharded_and_checkpointed_layers_keep_what_torch_keeps(kept):
    model, (prompts, responses) = build("llama"), lists()
    model.gradient_checkpointing_enable()
    values = [list_logps(model, prompts, responses)]
    model.gradient_checkpointing_disable()
    with torch.no_grad():
        values.append(list_logps(model, prompts, responses))
    model.model.layers[0].self_attn.q_proj.weight.ds_id = 0  # as ZeRO-3 marks the weights it takes apart
    values.append(list_logps(model, prompts, responses))
    assert not kept.holders
    del values


# --- single operations -------------------------------------------------------------------------------------------


def graph(compute, *inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of what is computed, and the leaves."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with recompute.cheap_again(nn.Identity()):
        return compute(*leaves).sum(), leaves


def grads(compute, *inputs) -> list[torch.Tensor]:
    total, leaves = graph(compute, *inputs)
    return list(torch.autograd.grad(total, leaves))


def test_results_changed_in_place_are_not_made_from_their_recipe():
    def compute(x):
        square = x * x
        square.mul_(2.0)
        return square * square  # 4 x^4

    assert torch.equal(grads(compute, torch.tensor([3.0]))[0], torch.tensor([16.0 * 27]))


def test_what_is_needed_and_was_changed_in_place_is_an_error():
    x = torch.ones(2, requires_grad=True)
    with recompute.cheap_again(nn.Identity()):
        exponential = torch.exp(x)
        out = nn.functional.silu(exponential) * 2
    exponential.detach().zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_sums_are_kept_unless_both_sides_come_from_the_same(kept):
    x, y = torch.rand(5), torch.rand(5)
    total, _ = graph(lambda x: (x + 0.5 * x**3) ** 2, x)
    assert kept.sizes() == [20]  # x
    total, _ = graph(lambda x, y: (torch.exp(x) + torch.exp(y)) ** 2, x, y)
    assert kept.sizes() == [20] * 3  # both exponentials for their own gradients, and the sum
    del total


def test_casts_down_are_kept_and_casts_up_are_not(kept):
    x = torch.tensor([1.001])
    total, (leaf,) = graph(lambda x: torch.sin(x).to(torch.bfloat16).float() ** 2, x)
    assert kept.sizes() == [2, 4]  # the cast's result, and x for the sine
    (gradient,) = torch.autograd.grad(total, leaf)
    assert torch.equal(gradient, (2 * torch.sin(x).bfloat16().float()).bfloat16().float() * torch.cos(x))


def test_chains_match_autograd():
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)

    def compute(x):
        return (torch.exp(x).reshape(1, -1).contiguous() * torch.tanh(0.3 * x)).transpose(0, 1) ** 3

    leaf = x.clone().requires_grad_()
    assert torch.equal(grads(compute, x)[0], torch.autograd.grad(compute(leaf).sum(), leaf)[0])


def test_rows_are_computed_alone_where_every_operation_goes_by_row(monkeypatch):
    x, weight = torch.rand(1, 6, 4).requires_grad_(), torch.rand(4).requires_grad_()
    with recompute.cheap_again(nn.Identity()):
        norm = weight * (x * torch.exp(x).mean(-1, keepdim=True))
        product = nn.functional.silu(norm) * norm
        recipe, turned = recompute._pack(product), recompute._pack(product.transpose(0, 1))
    rows, sizes, apply = torch.tensor([1, 4]), [], recompute._Recipe._apply

    def note(self, args):
        sizes.append(apply(self, args).shape)
        return apply(self, args)

    monkeypatch.setattr(recompute._Recipe, "_apply", note)
    assert torch.equal(recipe.rows(rows), product[0, rows])
    assert set(sizes) == {(2, 4)}
    assert torch.equal(turned.rows(rows), product[0, rows])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_where_rows_are_left_out(monkeypatch, name):
    zero = ((0, 1), (0, 2), (0, 5), (1, 0), (1, 1), (2, 0))
    model, (prompts, responses) = build(name), lists()
    ours = gradients(model, weigh(list_logps(model, prompts, responses, layout="tree"), zero))
    monkeypatch.setattr(trunk, "cheap_again", lambda *_: nullcontext())
    theirs = gradients(model, weigh(list_logps(model, prompts, responses, layout="tree"), zero))
    # The last elements of a tensor do not run through the vector units, which round in their own way.
    assert largest_error(ours, theirs) < 1e-13
