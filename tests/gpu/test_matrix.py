"""Every way to train, in 16 bits: as little is lost as by plain transformers; and whole runs of the rarer methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankalign.models import load as models
from rankalign.recipes.rollouts import reward_of, sampler_of
from rankalign.rows import recipes
from rankalign.rows.logps import list_logps
from rankalign.rows.two_pass import backward_two_pass
from rankalign.training.arguments import parse_settings
from rankalign.training.ppo.run import train_ppo
from rankalign.training.run import train
from tests.e2e.distributed import settings, write_data
from tests.gpu.models import FAMILIES, build, lists
from tests.gpu.test_rows import ZERO

WAYS = ("lora", "checkpointing", "two passes", "active sets")


@pytest.fixture(autouse=True)
def _large_rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With what is left out and computed again, and the device as it was."""
    monkeypatch.setattr(recipes, "BY_HOST", 0)
    yield
    models.stay_on_cpu(False)


def slopes(way: str) -> Tensor:
    """(P, N) what each response's log-probability is multiplied by; none is large, so that errors add up alike."""
    found = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    for place in ZERO if way == "active sets" else ():
        found[place] = 0.0
    return found


def plain(model: nn.Module) -> Tensor:
    """(P, N) log-probs by the model's own logits, one response at a time."""
    device, sums = next(model.parameters()).device, torch.zeros(3, 6)
    rows = []
    for prompt, responses in zip(*lists(), strict=True):
        row = []
        for response in responses:
            ids = torch.tensor([prompt + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            row.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())
        row += [torch.zeros((), device=device)] * (6 - len(row))
        rows.append(torch.stack(row))
    return torch.stack(rows).to(sums.device)


def measured(model: nn.Module, way: str, ours: bool, autocast: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and all gradients in one vector, on the CPU."""
    if way == "checkpointing" and ours:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        if ours and way == "two passes":
            weigh = slopes(way).to("cuda")
            sums = backward_two_pass(model, *lists(), lambda x: (x * weigh).sum(), 16, layout="tree")[1]
        else:
            sums = list_logps(model, *lists(), layout="tree") if ours else plain(model)
    if sums.requires_grad:
        (sums.cpu() * slopes(way)).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return sums.detach().cpu(), torch.cat([g.flatten().float().cpu() for g in grads])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_no_way_loses_more_than_plain_transformers(name: str, way: str, autocast: bool) -> None:
    # Twice, as where a run tries its layout: both are rounding, of eleven sums of which the longest outweighs others.
    lora = way == "lora"
    exact = measured(build(name, torch.float32, lora=lora), way, False, False)
    device = build(name, torch.float32, lora=lora).to("cuda", torch.float32 if autocast else torch.bfloat16)
    lost, found = (measured(device, way, ours, autocast) for ours in (False, True))
    for theirs, own, value in zip(lost, found, exact, strict=True):
        assert 0 < float((own - value).norm()) <= 2 * float((theirs - value).norm())


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"loss": "dpo", "use_lora": True, "use_dora": True},
    "two passes": {"loss": "rrhf", "two_pass": "always", "token_budget": 24},
    "two passes, lora, checkpointing": {
        "loss": "dpo",
        "use_lora": True,
        "two_pass": "always",
        "token_budget": 24,
        "gradient_checkpointing": True,
    },
    "mixture": {"loss": "dpo+0.2*sft"},
}
ONE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3, "save_steps": 3}


def values(folder: Path, name: str) -> list[float]:
    return [line[name] for line in map(json.loads, (folder / "log.jsonl").open()) if name in line]


@pytest.mark.parametrize("method", METHODS)
def test_runs_in_bf16_learn_what_the_cpu_learns(method: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    for name, more in (("cpu", {"use_cpu": True}), ("gpu", {"bf16": True})):
        train(parse_settings(settings(data, tmp_path / name, **METHODS[method], **ONE, **more)))
    here, there = (values(tmp_path / name, "loss") for name in ("cpu", "gpu"))
    assert here != there
    assert there == pytest.approx(here, rel=0.03, abs=0.01)


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"bf16": True, "use_lora": True}])
def test_ppo_samples_grades_and_learns(more: dict[str, Any], tmp_path: Path) -> None:
    """The first rollouts in float32 are the CPU's, token for token; in bf16 all numbers are there and finite."""
    data = write_data(tmp_path / "data.jsonl")
    runs = {}
    for name, where in (("cpu", {"use_cpu": True}), ("gpu", more)):
        words = settings(data, tmp_path / name, method="ppo", reward="rankalign.scorers.builtin:words", rollouts=8)
        own = {"max_new_tokens": 6, "per_device_train_batch_size": 4, "ppo_epochs": 1, "max_steps": 2, **where}
        config: Any = parse_settings({**words, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1, **own})
        train_ppo(config, sampler_of(config), reward_of(config))
        runs[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()]
    assert len(runs["gpu"]) == 2
    assert all(isinstance(line[key], float) for line in runs["gpu"] for key in ("reward", "policy_loss", "value_loss"))
    if not more:
        assert runs["gpu"][0]["reward"] == runs["cpu"][0]["reward"]
