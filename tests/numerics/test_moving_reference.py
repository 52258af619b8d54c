"""References that move: hard and soft updates, BEMA, with all weights and with an adapter; resumed to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError, Interrupted
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.training.arguments import parse_settings
from rankalign.training.moving import FILE, MovingReference
from rankalign.training.plan import plan
from rankalign.training.run import train
from rankalign.training.settings import LossSettings

LN2 = math.log(2)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")
    answers = [("blue", "green and blue and green"), ("sun", "moon moon")]
    sets = [
        CandidateSet(str(i), f"say {w}", [Response(w, scores={"j": 1.0}), Response(y, scores={"j": 0.0})])
        for i, (w, y) in enumerate(answers)
    ]
    write(tmp_path / "data.jsonl", sets)
    return str(tmp_path / "data.jsonl")


def settings(folder: Path, data: str, **more: Any) -> Any:
    fixed = {"model": "tiny", "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "data": data}
    fixed |= {"loss": "dpo", "beta": 1.0, "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0}
    fixed |= {"per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 1, "save_strategy": "no"}
    return parse_settings({**fixed, "sync_ref_model": True, "gradient_accumulation_steps": 1, **more})


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("more", [{}, {"use_lora": True}, {"loss": "tdpo1"}, {"loss": "ld_dpo"}])
def test_a_hard_update_makes_the_reference_the_policy(tmp_path: Path, data: str, more: dict[str, Any]) -> None:
    """At the first update behind it both are one model, so its loss is that of the first update of all: ln 2."""
    train(settings(tmp_path / "run", data, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2, **more))
    found = losses(tmp_path / "run")
    assert [found[i] for i in (0, 2, 4)] == pytest.approx([LN2] * 3, abs=1e-6)
    assert max(found[1], found[3], found[5]) < LN2 - 1e-3
    assert not list((tmp_path / "cache").rglob("reference/*.table"))


def test_a_soft_update_is_between_the_two(tmp_path: Path, data: str) -> None:
    """The reference of a checkpoint after one soft update, from the weights that it holds and those of the start."""
    run = tmp_path / "run"
    how = {"ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1, "max_steps": 1, "save_strategy": "steps"}
    train(settings(run, data, save_steps=1, **how))
    held, policy = load_file(run / "checkpoint-1" / FILE), load_file(run / "checkpoint-1" / "model.safetensors")
    start = dict(tiny.build_model().named_parameters())
    moved = 0.0
    for name, weight in policy.items():
        expected = 0.3 * weight + 0.7 * start[name].detach()
        torch.testing.assert_close(held[f"weights.{name}"], expected, atol=1e-7, rtol=1e-6)
        moved = max(moved, float((weight - start[name].detach()).abs().max()))
    assert moved > 1e-3


def test_soft_updates_are_trls() -> None:
    """TRL's own callback on the same walk of the policy; and its BEMA."""
    from trl import BEMACallback
    from trl.trainer.callbacks import SyncRefModelCallback

    torch.manual_seed(0)
    model, theirs = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    theirs.load_state_dict(model.state_dict())
    bema = BEMACallback(update_freq=2)
    bema._unwrap_model = lambda m: m
    bema.theta0_params = [p.detach().clone() for p in model.parameters()]
    bema.ema_params = [p.detach().clone() for p in model.parameters()]
    bema.thetat_params, bema.running_model = list(model.parameters()), theirs_of(model)
    soft = MovingReference(LossSettings(loss="dpo", sync_ref_model=True, ref_model_sync_steps=2))
    mean = MovingReference(LossSettings(loss="dpo", sync_ref_model=True, ref_model_sync_steps=2, ref_model_bema=True))
    state, args = SimpleNamespace(global_step=0), SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.6)
    for ours in (soft, mean):
        ours.on_train_begin(args, state, None, model=model)
    for step in range(1, 8):
        state.global_step = step
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn(weight.shape, dtype=weight.dtype)
        if step % 2 == 0:
            SyncRefModelCallback._sync_target_model(model, theirs, 0.6)
            with torch.no_grad():
                bema._update_bema_weights(step)
        for ours in (soft, mean):
            ours.on_step_end(args, state, None, model=model)
    for ours, right in ((soft, theirs), (mean, bema.running_model)):
        for name, weight in right.named_parameters():
            torch.testing.assert_close(ours.weights[name], weight.detach(), atol=1e-12, rtol=1e-12)


def theirs_of(model: torch.nn.Module) -> torch.nn.Module:
    other = torch.nn.Linear(3, 2).double()
    other.load_state_dict(model.state_dict())
    return other


def test_beside_is_another_model_and_leaves_this_one_as_it_was() -> None:
    model = tiny.build_model().double()
    ours = MovingReference(LossSettings(loss="dpo", sync_ref_model=True))
    ours.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        for weight in model.parameters():
            weight += 0.1
        after = model(ids).logits
    with ours.beside(model) as reference, torch.no_grad():
        assert torch.equal(reference(ids).logits, before)
        assert not reference.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, after)


@pytest.mark.parametrize("more", [{}, {"use_lora": True, "ref_model_bema": True}])
def test_resumed_to_the_bit(tmp_path: Path, data: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 3, **more}
    train(settings(tmp_path / "whole", data, **how))
    original = MovingReference.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:  # behind the checkpoint of step 3
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(MovingReference, "on_step_end", stop)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(settings(tmp_path / "cut", data, **how))
    monkeypatch.setattr(MovingReference, "on_step_end", original)
    assert train(settings(tmp_path / "cut", data, **how))["steps"] == 6
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "cut" / path.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_without_its_reference_is_refused(tmp_path: Path, data: str) -> None:
    how = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    config = settings(tmp_path / "run", data, **how)
    train(config)
    (tmp_path / "run" / "manifest.json").unlink()
    for path in (tmp_path / "run").glob(f"checkpoint-*/{FILE}"):
        path.unlink()
    for path in (tmp_path / "run").glob("checkpoint-6/trainer_state.json"):
        path.unlink()
    with pytest.raises(InputError, match=r"reference\.safetensors is gone"):
        train(settings(tmp_path / "run", data, **how))


@pytest.mark.parametrize(("more", "copies"), [({}, 1), ({"ref_model_bema": True}, 3), ({"use_lora": True}, 1)])
def test_plan_says_its_memory(tmp_path: Path, data: str, more: dict[str, Any], copies: int) -> None:
    found = plan(settings(tmp_path / "run", data, **more))
    numbers = sum(p.numel() for p in tiny.build_model().parameters())
    held = found["memory"]["reference"]
    assert held == 4 * copies * numbers if "use_lora" not in more else 0 < held < 4 * numbers


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sync_ref_model": False, "ref_model_sync_steps": 4}, "does nothing without --sync_ref_model"),
        ({"ref_model_mixup_alpha": 0.0}, "above 0 and at most 1"),
        ({"loss": "simpo", "beta": 2.0}, "has no reference that could move"),
        ({"references": "before"}, "not --references before"),
        ({"fsdp": "full_shard"}, "whole weights"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(tmp_path / "run", data, **more)
