"""Norms in one launch are those of transformers, and what is no such norm stays what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rankalign.rows.norms import fuse_norms
from tests.gpu.models import build


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_types_are_those_of_transformers_and_values_its_own_but_for_rounding(
    states: torch.dtype, weight: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    model = build("qwen3", torch.float32).to("cuda", weight)
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    for plain, ours in zip(norms(model), norms(fused), strict=True):
        x = torch.randn(1, 5, plain.weight.shape[0], dtype=states, device="cuda")
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            found = [norm(leaf) for norm, leaf in zip((plain, ours), leaves, strict=True)]
        assert found[0].dtype == found[1].dtype
        narrow = torch.bfloat16 in (states, weight)
        slope = torch.randn_like(x)
        for out in found:
            (out * slope).sum().backward()
        pairs = ((found[0], found[1]), (leaves[0].grad, leaves[1].grad), (plain.weight.grad, ours.weight.grad))
        for a, b in pairs:
            scale = float(a.float().abs().max())
            assert float((a.float() - b.float()).abs().max()) <= scale * (2**-6 if narrow else 1e-6)


def test_each_is_one_launch_and_a_copy_is_a_norm_of_its_own(watch: Any) -> None:
    model = build("llama", torch.float32).to("cuda")
    fuse_norms(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for norm in norms(other):
            norm.weight.zero_()
    x = torch.randn(1, 3, 32, device="cuda")
    for norm, copied in zip(norms(model), norms(other), strict=True):
        with watch() as log:
            out = norm(x)
        assert [name for name, _, _ in log.kernels] == ["aten::_fused_rms_norm"]
        assert bool((out != 0).any())
        assert not bool((copied(x) != 0).any())


def test_others_and_those_on_a_cpu_stay_as_they_are() -> None:
    class TwiceRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    model = build("llama", torch.float32)
    fuse_norms(model)
    assert not [norm for norm in norms(model) if "forward" in vars(norm)]
    model.model.norm = TwiceRMSNorm(32)
    model.model.layers[0].input_layernorm = Gemma2RMSNorm(32)  # multiplies by one more than its weight
    model = model.to("cuda")
    fuse_norms(model)
    assert [("forward" in vars(norm)) for norm in norms(model)] == [False, True, True, True, False]
