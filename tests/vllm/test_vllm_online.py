"""OP-k with engine ``vllm``: the weights that train are those that answer, and a kill in any phase leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="vllm is not installed here; make test-vllm has an environment of its own")

from rankalign.config import build
from rankalign.data.records import CandidateSet, read, write
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.models import load as models
from rankalign.recipes.iterate import IterateConfig, run
from rankalign.recipes.rollouts import reward_of, sampler_of
from rankalign.training.arguments import parse_settings
from rankalign.training.ppo.run import load_actor, load_questions
from rankalign.training.ppo.trainer import PPOTrainer
from tests.vllm.small import save

REWARD = """
def share(samples, prompts, outputs, **meta):
    return [sum('a' <= c <= 'z' for c in o) / max(len(o), 1) for o in outputs]


def varied(samples, outputs, **meta):
    return [float(i % 3 + len(o) % 5) for i, o in enumerate(outputs)]
"""
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"use_lora": True, "lora_r": 4}}
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    words = ["the old cat", "a red sea", "new blue", "sea sea", "old", "cat and red"]
    write(tmp_path / "prompts.jsonl", [CandidateSet(f"p{i}", text) for i, text in enumerate(words)])
    save(tmp_path / "start")
    return tmp_path


def settings(folder: Path, name: str, **train: Any) -> IterateConfig:
    """Three blocks of two updates, each of two prompts; all weights are saved after each update."""
    fixed = {
        "learning_rate": 5e-2, "num_train_epochs": 2, "lr_scheduler_type": "constant", "disable_tqdm": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "use_cpu": True, "save_steps": 1,
        "save_total_limit": 20, "warmup_steps": 0,
    }  # fmt: skip
    content = {
        "output": str(folder / name),
        "prompts": str(folder / "prompts.jsonl"),
        "policies": [
            {"name": "own", "engine": "vllm", "n": 3, "max_new_tokens": 8},
            {"name": "greedy", "engine": "vllm", "temperature": 0, "max_new_tokens": 8},
        ],
        "scorers": [{"name": "share", "kind": "function", "function": f"{folder}/reward.py:share"}],
        "judge": "share",
        "model": str(folder / "start"),
        "refresh_every": 2,
        "train": {**fixed, **train},
    }
    return build(IterateConfig, content, "test")


def greedy_of(path: Path) -> list[str]:
    return [r.text for record in read(path) for r in record.responses if r.policy == "greedy"]


def by_hf(folder: Path, model: Path, prompts: Path) -> list[str]:
    """What engine ``hf`` says greedily with weights that lie in a folder."""
    where = {"model": str(folder / "start"), "adapter": str(model)} if (model / "adapter_config.json").exists() else {}
    if not where:
        models.load_tokenizer(str(folder / "start")).save_pretrained(model)
    engine = HFEngine(Policy("greedy", sampling=GREEDY, **(where or {"model": str(model)})))
    return [row[0].text for row in engine.generate(list(read(prompts)))]


@pytest.mark.parametrize("method", METHODS)
def test_greedy_answers_after_each_refresh_are_those_of_the_trainers_weights(folder: Path, method: str) -> None:
    result = run(settings(folder, "op", **METHODS[method]))
    assert [(row["steps"], row["refreshed_at"]) for row in result["rounds"]] == [(2, 0), (2, 2), (2, 4)]
    for number, step in ((1, 0), (2, 2), (3, 4)):
        round_folder = folder / f"op/round-{number}"
        model = folder / f"op/model/checkpoint-{step}" if step else folder / "start"
        wanted = by_hf(folder, model, round_folder / "prompts.jsonl")
        assert greedy_of(round_folder / "candidates.jsonl") == wanted
        if step:
            assert wanted != by_hf(folder, folder / "start", round_folder / "prompts.jsonl")  # they have moved


class Killed(BaseException):
    """Nothing in the package catches it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Die at the n-th time that anything is forced to disk; returns how many there have been."""
    calls, real = [0], os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise Killed
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: calls[0]


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_every_phase_it_leaves_the_same_records(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, scoring, updates, checkpoints and the end: deaths in even steps over all that a run writes."""
    with monkeypatch.context() as patch:
        counted = killed_at(patch, 0)
        run(settings(folder, "whole", **METHODS[method]))
        total = counted()
    deaths = 0
    while True:
        with monkeypatch.context() as patch:
            killed_at(patch, total // 5)
            try:
                run(settings(folder, "cut", **METHODS[method]))
                break
            except Killed:
                deaths += 1
    assert deaths > 3
    paths = sorted(p.relative_to(folder / "whole") for p in (folder / "whole").rglob("*.jsonl"))
    assert len(paths) >= 10
    for path in paths:
        if path.name != "log.jsonl":
            assert (folder / "whole" / path).read_bytes() == (folder / "cut" / path).read_bytes(), path
    (file,) = (folder / "whole/model").glob("*.safetensors")
    assert file.read_bytes() == (folder / "cut/model" / file.name).read_bytes()
    assert json.loads((folder / "cut/result.json").read_text())["steps"] == 6


@pytest.mark.parametrize("lora", [False, True])
def test_the_sampler_of_ppo_has_the_weights_that_train(folder: Path, lora: bool) -> None:
    """Nearly greedy answers beside those of the sampler that decodes with the policy, before and after a step."""
    fixed = {"method": "ppo", "model": str(folder / "start"), "reward": f"{folder}/reward.py:varied", "use_cpu": True}
    fixed |= {"data": str(folder / "prompts.jsonl"), "output_dir": str(folder / "ppo"), "disable_tqdm": True}
    fixed |= {"rollouts": 6, "max_new_tokens": 8, "max_length": 64, "warmup_steps": 0, "max_steps": 1, "use_lora": lora}
    config: Any = parse_settings({**fixed, "learning_rate": 5e-2, "temperature": 0.01, "sampler": "vllm"})
    plain = sampler_of(dataclasses.replace(config, sampler="hf"))
    tokenizer = models.load_tokenizer(config.model)
    questions, _ = load_questions(config, tokenizer)
    trainer = PPOTrainer(load_actor(config, questions), questions, config, sampler_of(config), reward_of(config))
    prompts, keys = [q.tokens for q in questions], [(q.record.id, 0) for q in questions]
    seen = []
    for _ in range(2):
        trainer.actor.eval()
        with torch.no_grad():
            found = trainer.sampler(trainer.actor.policy, prompts, keys)
            assert [a.text for a in found] == [a.text for a in plain(trainer.actor.policy, prompts, keys)]
        assert all(a.finished == (a.ids[-1] == 2) for a in found)
        seen.append([a.text for a in found])
        trainer.iterate()
    assert seen[0] != seen[1]


@pytest.mark.parametrize("method", METHODS)
def test_answers_ahead_are_those_of_the_weights_of_a_block_before(folder: Path, method: str) -> None:
    run(dataclasses.replace(settings(folder, "op", **METHODS[method]), ahead=1))
    for number, step in ((2, 0), (3, 2)):
        round_folder = folder / f"op/round-{number}"
        model = folder / f"op/model/checkpoint-{step}" if step else folder / "start"
        assert greedy_of(round_folder / "candidates.jsonl") == by_hf(folder, model, round_folder / "prompts.jsonl")
