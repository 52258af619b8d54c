"""Log-probs and gradients of tree rows on a GPU against padded rows, or plain transformers, on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankalign.rows import flash_varlen, flex
from rankalign.rows.logps import list_logps, token_logps
from rankalign.rows.two_pass import backward_two_pass
from tests.gpu.models import EXPERTS, FAMILIES, StayWide, build, gradients, lists, weigh

ZERO = ((0, 1), (0, 2), (0, 5), (1, 0), (1, 1), (2, 0))
WAYS = ("plain", "lora", "checkpointing", "two passes", "active sets")


def loss_of(way: str, sums: Tensor) -> Tensor:
    return weigh(sums.cpu(), ZERO if way == "active sets" else ())


def run(model: nn.Module, way: str, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(P, N) log-probs and the gradient of each weight, on the CPU."""
    prompts, responses = lists()
    if way == "checkpointing":
        again: Any = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), StayWide())}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
    if way == "two passes":
        model.zero_grad()
        sums = backward_two_pass(model, prompts, responses, lambda x: loss_of(way, x), 16, layout=layout)[1]
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    else:
        sums = list_logps(model, prompts, responses, layout=layout)
        found = gradients(model, loss_of(way, sums))
    return sums.detach().cpu(), {n: g.cpu() for n, g in found.items()}


def error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Worst relative error of a weight's gradient; those that are zero but for rounding count by the largest."""
    floor = 1e-4 * max(float(g.norm()) for g in reference.values())
    return max(float((ours[n] - g).norm() / g.norm().clamp(min=floor)) for n, g in reference.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FAMILIES, *EXPERTS])
def test_a_gpus_trees_are_the_cpus_padded_rows(
    name: str, way: str, any_type: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in (flash_varlen, flex):
        monkeypatch.setattr(kernel, "ANY_TYPE", True)
    host, device = (build(name, lora=way == "lora") for _ in range(2))
    with StayWide():
        expected, slopes = run(host, "plain" if way != "active sets" else way, "padded")
        ours, found = run(device.to("cuda"), way, "tree")
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    assert error(found, slopes) < 1e-11


def plain(model: nn.Module) -> Tensor:
    """(tokens,) log-probs by the model's own logits, one response at a time."""
    device, found = next(model.parameters()).device, []
    for prompt, responses in zip(*lists(), strict=True):
        for response in responses:
            ids = torch.tensor([prompt + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


def packed(model: nn.Module) -> Tensor:
    """The same by tree rows."""
    return torch.cat([tokens for row in token_logps(model, *lists(), layout="tree") for tokens in row])


def values_and_slopes(model: nn.Module, compute: Any, autocast: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        found = compute(model)
    slope = torch.randn(len(found), generator=torch.Generator().manual_seed(7))
    slopes = gradients(model, (found.cpu() * slope).sum())
    return found.detach().cpu(), torch.cat([g.flatten().float().cpu() for g in slopes.values()])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_trees_lose_no_more_than_plain_transformers(name: str, autocast: bool) -> None:
    exact = values_and_slopes(build(name, torch.float32), plain, False)
    device = build(name, torch.float32).to("cuda", torch.float32 if autocast else torch.bfloat16)
    lost, ours = (values_and_slopes(device, compute, autocast) for compute in (plain, packed))
    for theirs, own, value in zip(lost, ours, exact, strict=True):
        assert 0 < float((own - value).norm()) <= 1.5 * float((theirs - value).norm())
