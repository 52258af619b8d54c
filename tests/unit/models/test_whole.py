"""A model that is whole for a while: the weights of the moment, those that were kept, and none behind the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

from rankalign.models import adapters, tiny
from rankalign.models.whole import Whole

IDS = torch.tensor([[1, 40, 41, 42, 60]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def moved(model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_there_while_a_context_lasts(lora: bool, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    PartialState(cpu=True)
    model: Any = tiny.build_model().train()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model = adapters.add_lora(model, 4, 8, 0.0) if lora else model
    whole, start = Whole(model), logits(model)
    assert not list(filter(len, whole._copy.parameters()))
    whole.keep(model)
    moved(model)
    now = logits(model)
    assert not torch.equal(now, start)
    for _ in range(2):
        with whole.now(model) as copy:
            assert torch.equal(logits(copy), now)
            assert not copy.training
            lm = copy.get_base_model() if lora else copy
            assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
        with whole.kept() as copy:
            assert torch.equal(logits(copy), start)
    assert not list(filter(len, whole._copy.parameters()))
    assert torch.equal(logits(model), now)
    assert model.training
    assert capsys.readouterr().err.count("each process has all weights") == 1
