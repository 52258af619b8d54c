"""A begun run goes on under its own settings and data alone, whatever the stage, and ends in an unbroken one's bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError, Interrupted
from rankalign.models import load as models
from rankalign.training.arguments import parse_settings
from rankalign.training.identity import EXEMPT, identity
from rankalign.training.run import StopOnSignal, train


def put(path: Path, word: str = "it") -> str:
    sizes = [Response("yes " * n, scores={"j": float(n)}) for n in (1, 2, 3)]
    write(path, [CandidateSet(f"p{i}", f"Is {word} {i}?", sizes) for i in range(4)])
    return str(path)


def content(folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    usual: dict[str, Any] = {"model": "tiny", "use_cpu": True, "disable_tqdm": True, "max_steps": 3}
    usual |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    return {**usual, "data": str(folder / "data.jsonl"), "output_dir": str(folder / "run"), **more}


def ranked(folder: Path, more: dict[str, Any]) -> Any:
    return train(parse_settings(content(folder, more)))


def first_step_alone(patch: pytest.MonkeyPatch) -> None:
    """Have a signal arrive as soon as training listens for one: the run ends after an update, with a checkpoint."""
    init = StopOnSignal.__init__

    def signalled(self: StopOnSignal) -> None:
        init(self)
        os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(StopOnSignal, "__init__", signalled)


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def test_weights_alone_are_no_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data.jsonl")
    with monkeypatch.context() as patch:
        first_step_alone(patch)
        with pytest.raises(Interrupted):
            ranked(tmp_path, {"save_only_model": True})
    assert "cannot go on from its checkpoints" in capsys.readouterr().err
    for again in (True, False):
        with pytest.raises(InputError, match="no optimiser to go on with"):
            ranked(tmp_path, {"save_only_model": again})


def test_a_checkpoint_that_is_named_is_taken_or_refused(tmp_path: Path) -> None:
    put(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match="no such checkpoint"):
        ranked(tmp_path, {"resume_from_checkpoint": str(tmp_path / "nowhere")})
    ranked(tmp_path, {"save_steps": 1})
    first = {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-2"), "output_dir": str(tmp_path / "more")}
    assert ranked(tmp_path, first)["steps"] == 3
    assert weights(tmp_path / "more") == weights(tmp_path / "run")
    with pytest.raises(InputError, match=r"learning_rate: 0\.01 -> 0\.1"):
        ranked(tmp_path, {**first, "learning_rate": 0.1, "output_dir": str(tmp_path / "third")})
    with pytest.raises(InputError, match="holds no checkpoint"):
        ranked(tmp_path, {"resume_from_checkpoint": "True", "output_dir": str(tmp_path / "fourth")})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neftune_noise_alpha", 5.0),
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("optim_args", "momentum=0.9"),
        ("full_determinism", True),
        ("weight_decay", 0.1),
        ("dataloader_drop_last", True),
        ("adam_beta2", 0.9),
        ("accelerator_config", {"use_seedable_sampler": False}),
        ("keep_float32", True),
    ],
)
def test_what_can_change_a_number_is_identity(name: str, value: Any) -> None:
    usual = identity(parse_settings({"use_cpu": True, "optim": "sgd"}))
    changed = identity(parse_settings({"use_cpu": True, "optim": "sgd", name: value}))
    assert name not in EXEMPT
    assert {key for key in usual | changed if usual.get(key) != changed.get(key)} == {name}


def test_what_is_told_and_kept_is_not_unless_a_best_checkpoint_is_sought() -> None:
    usual = identity(parse_settings({"use_cpu": True}))
    more = {"logging_steps": 7, "save_steps": 3, "save_total_limit": 1, "dataloader_num_workers": 1, "run_name": "x"}
    assert identity(parse_settings({"use_cpu": True, **more, "output_dir": "elsewhere"})) == usual
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 3}
    assert identity(parse_settings({"use_cpu": True, **best, "save_steps": 3}))["save_steps"] == 3


def test_finished_already_asks_for_the_same_identity(tmp_path: Path) -> None:
    put(tmp_path / "data.jsonl")
    ranked(tmp_path, {"max_steps": 1})
    assert ranked(tmp_path, {"max_steps": 1, "logging_steps": 5})["already_finished"]
    with pytest.raises(InputError, match="neftune_noise_alpha: null -> 2"):
        ranked(tmp_path, {"max_steps": 1, "neftune_noise_alpha": 2.0})
    assert models.weights_of(str(tmp_path / "run"))
