"""Training stopped by a signal after any update and started again is training that was never stopped, to the bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankalign.errors import Interrupted
from rankalign.training import run
from rankalign.training.arguments import parse_settings
from tests.e2e.distributed import log, settings, write_data

SEED = 20261121


def options(data: Path, output: Path, **more: Any) -> Any:
    """12 updates over 4 epochs of 5 micro-batches, the last of each short; warm-up, workers and accumulation."""
    own = {"max_steps": 12, "save_steps": 100, "per_device_train_batch_size": 2, "warmup_steps": 3, "use_cpu": True}
    return parse_settings(settings(data, output, **own, **more))


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise SIGTERM in the update after which training is to stop."""
    original = run.StopOnSignal.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, args, state, control, **more)

    monkeypatch.setattr(run.StopOnSignal, "on_step_end", on_step_end)


def equal_files(a: Path, b: Path) -> None:
    """Weights, optimiser, schedule and random states of two checkpoints are the same to the bit."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert _plain(ours) == _plain(theirs)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    "more",
    [
        {"dataloader_num_workers": 1},
        pytest.param({"use_lora": True, "lora_dropout": 0.1, "loss": "dpo"}, marks=pytest.mark.slow),
    ],
    ids=["rrhf-workers", "dpo-lora-dropout"],
)
def test_stopped_three_times_at_random(tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data.jsonl")
    steps = sorted(random.Random(SEED).sample(range(1, 12), 3))
    print(f"seed {SEED}: stopped after updates {steps}")
    run.train(options(data, tmp_path / "whole", **more))
    for step in steps:
        stop_after(step, monkeypatch)
        with pytest.raises(Interrupted, match=f"stopped at step {step}"):
            run.train(options(data, tmp_path / "cut", **more))
        monkeypatch.undo()
    run.train(options(data, tmp_path / "cut", **more))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert log(whole) == log(cut)
    assert (whole / "ledger.jsonl").read_text() == (cut / "ledger.jsonl").read_text()
    if "use_lora" in more:
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    else:
        equal_files(whole / "checkpoint-12", cut / "checkpoint-12")
    assert len(list(cut.glob("checkpoint-*"))) == 2  # save_total_limit
    states = [(folder / "checkpoint-12" / "rng_state.pth").read_bytes() for folder in (whole, cut)]
    assert states[0] == states[1]


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, finished in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if finished:
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert run.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert run.last_checkpoint(tmp_path / "nothing") is None
