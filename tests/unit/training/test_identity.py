"""A begun run goes on under its own settings and data alone, whatever the stage, and ends in an unbroken one's bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import ScorerConfig
from rankalign.data.records import CandidateSet, Response, write
from rankalign.engines import Policy, SamplingParams
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.recipes.iterate import IterateConfig
from rankalign.recipes.iterate import run as iterate
from rankalign.recipes.rollouts import reward_of, sampler_of
from rankalign.training.arguments import PPOConfig, parse_settings
from rankalign.training.identity import EXEMPT, identity
from rankalign.training.ppo.run import train_ppo
from rankalign.training.ppo.trainer import PPOTrainer
from rankalign.training.run import Interrupted, StopOnSignal, train

GRADE = "def grade(samples):\n    return [float(len(text)) for text in samples]\n"
Stage = Callable[[Path, dict[str, Any]], Any]


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


def ppo(folder: Path, more: dict[str, Any]) -> Any:
    (folder / "grade.py").write_text(GRADE)
    told = {"method": "ppo", "reward": f"{folder}/grade.py:grade", "rollouts": 2, "max_new_tokens": 4, "ppo_epochs": 1}
    config = parse_settings(content(folder, {**told, "save_steps": 1, **more}))
    assert isinstance(config, PPOConfig)
    return train_ppo(config, sampler_of(config), reward_of(config))


def online(folder: Path, more: dict[str, Any], every: int = 1) -> Any:
    (folder / "grade.py").write_text(GRADE)
    training = content(folder, more)
    given = ("model", "data", "output_dir")
    scorer = ScorerConfig("len", "function", {"function": f"{folder}/grade.py:grade"})
    policy = Policy("now", model="default", sampling=SamplingParams(n=2, max_new_tokens=4, temperature=1.0))
    rest = {key: value for key, value in training.items() if key not in given}
    return iterate(
        IterateConfig(
            prompts=training["data"],
            output=training["output_dir"],
            policies=[policy],
            scorers=[scorer],
            judge="len",
            model="tiny",
            rounds=1,
            refresh_every=every,
            train=rest,
        )
    )


STAGES: dict[str, tuple[Stage, dict[str, Any], dict[str, Any]]] = {
    "rank": (ranked, {"loss": "dpo"}, {"loss": "simpo"}),
    "sft": (ranked, {"method": "sft"}, {"learning_rate": 1e-6}),
    "reward": (ranked, {"method": "reward"}, {"optim_args": "amsgrad=True"}),
    "lora": (ranked, {"use_lora": True, "lora_r": 2}, {"lora_r": 4}),
    "ppo": (ppo, {}, {"kl_coef": 0.5}),
    "online": (online, {}, {"neftune_noise_alpha": 3.0}),
}


@pytest.mark.parametrize("name", STAGES)
def test_stopped_then_resumed_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, settings, other = STAGES[name]
    monkeypatch.setenv("RANKALIGN_CACHE", os.environ.get("RANKALIGN_CACHE") or str(tmp_path / "cache"))
    put(tmp_path / "data.jsonl")
    whole = tmp_path / "whole"
    stage(tmp_path, {**settings, "output_dir": str(whole)})
    with monkeypatch.context() as patch:
        first_step_alone(patch, name)
        with pytest.raises(Interrupted):
            stage(tmp_path, settings)
    with pytest.raises(InputError, match=rf"other settings \(.*{next(iter(other))}: .* -> "):
        stage(tmp_path, {**settings, **other})
    kept = (tmp_path / "data.jsonl").read_bytes()
    put(tmp_path / "data.jsonl", "that")
    with pytest.raises(InputError, match=r"other settings \(.*sha256"):
        stage(tmp_path, settings)
    (tmp_path / "data.jsonl").write_bytes(kept)
    stage(tmp_path, settings)
    inner = "model" if name == "online" else "."
    assert weights(tmp_path / "run" / inner) == weights(whole / inner)


def first_step_alone(patch: pytest.MonkeyPatch, name: str = "") -> None:
    """Have a signal arrive as soon as training listens for one: the run ends after an update, with a checkpoint."""
    init = StopOnSignal.__init__

    def signalled(self: StopOnSignal) -> None:
        init(self)
        os.kill(os.getpid(), signal.SIGTERM)

    iterate_once = PPOTrainer.iterate

    def signalled_after(self: PPOTrainer) -> Any:
        line = iterate_once(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return line

    if name == "ppo":  # whose loop looks for a signal before each step
        patch.setattr(PPOTrainer, "iterate", signalled_after)
    else:
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
        ("optim_args", "amsgrad=True"),
        ("full_determinism", True),
        ("weight_decay", 0.1),
        ("dataloader_drop_last", True),
        ("adam_beta2", 0.9),
        ("accelerator_config", {"use_seedable_sampler": False}),
        ("keep_float32", True),
    ],
)
def test_what_can_change_a_number_is_identity(name: str, value: Any) -> None:
    usual = identity(parse_settings({"use_cpu": True}))
    changed = identity(parse_settings({"use_cpu": True, name: value}))
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
