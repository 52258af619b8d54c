"""PPO in two processes against one at the same global batch: weights and log, and a kill at a random point."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankalign.data.records import CandidateSet, Response, write
from rankalign.recipes.rollouts import reward_of, sampler_of
from rankalign.training.arguments import parse_settings
from rankalign.training.ppo.run import train_ppo
from tests.e2e.distributed import flags, launch, launch_and_kill

# A third of the answers count for nothing, so that the processes have unequal numbers of tokens to learn from.
REWARD = """
def early(samples, outputs, **metadata):
    return [None if o and ord(o[0]) % 3 == 0 else sum(c.lower() < 'n' for c in o) / 4 for o in outputs]
"""
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_lora": True},
    "value net": {"value_model": "tiny-rm", "scale_rewards": "ref"},
    "baseline": {"reward_baseline": "human", "scale_rewards": "whiten", "layout": "padded"},
}


def settings(folder: Path, output: str, **more: Any) -> dict[str, Any]:
    """Three steps of ten answers in updates of four, the last of them of two."""
    (folder / "reward.py").write_text(REWARD)
    human = [Response("abz", "human")]
    write(folder / "prompts.jsonl", [CandidateSet(f"p{i}", "say " + "x" * i, human) for i in range(7)])
    fixed = {"method": "ppo", "model": "tiny", "reward": f"{folder}/reward.py:early", "rollouts": 10}
    fixed |= {"data": str(folder / "prompts.jsonl"), "output_dir": str(folder / output), "disable_tqdm": True}
    fixed |= {"template": "raw", "max_new_tokens": 6, "max_length": 40, "warmup_steps": 0, "max_steps": 3}
    fixed |= {"ppo_epochs": 2, "learning_rate": 3e-3, "kl_target": 0.01, "kl_horizon": 100, "save_steps": 1}
    return {**fixed, "scale_rewards": "running", "gradient_accumulation_steps": 1, "use_cpu": True, **more}


def alone(folder: Path, **more: Any) -> Path:
    """A run of one process."""
    config: Any = parse_settings(settings(folder, "one", per_device_train_batch_size=4, **more))
    train_ppo(config, sampler_of(config), reward_of(config))
    return folder / "one"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "kind", ["full", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "full")]
)
def test_two_processes_that_were_killed_are_one(one_thread: None, tmp_path: Path, kind: str) -> None:
    seed = int(os.environ.get("RANKALIGN_SEED") or random.SystemRandom().randrange(10**6))
    print("RANKALIGN_SEED =", seed)
    one, two = alone(tmp_path, **KINDS[kind]), tmp_path / "two"
    words = settings(tmp_path, "two", per_device_train_batch_size=2, **KINDS[kind])
    moment = random.Random(seed).randrange(3)  # so many steps are in the log
    killed = launch_and_kill("ddp", ["train", *flags(words)], lambda: len(list(two.glob("checkpoint-*"))) >= moment)
    assert killed
    done = launch("ddp", tmp_path / "facts.json", words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr or not moment
    check_equal(one, two)
    assert done.stdout.count("already_finished") == 1  # only the first process speaks
    assert done.stderr.count("data: ") <= 1
    assert (two / "manifest.json").exists()


@pytest.mark.parametrize(
    ("how", "kind", "killed"),
    [
        pytest.param("fsdp", "full", False, marks=pytest.mark.slow),
        *(
            pytest.param(how, kind, True, marks=pytest.mark.slow)
            for how in ("fsdp", "zero3", "zero2")
            for kind in ("full", "lora", "value net")
            if how != "zero2" or kind == "full"
        ),
    ],
)
def test_processes_that_share_the_weights_are_one(
    one_thread: None, tmp_path: Path, how: str, kind: str, killed: bool
) -> None:
    """Also where the weights come and go with each layer, and where they were killed."""
    moment = 0
    one, two = alone(tmp_path, **KINDS[kind]), tmp_path / "two"
    words = settings(tmp_path, "two", per_device_train_batch_size=2, **KINDS[kind])
    if killed:
        seed = int(os.environ.get("RANKALIGN_SEED") or random.SystemRandom().randrange(10**6))
        print("RANKALIGN_SEED =", seed)
        moment = random.Random(seed).randrange(3)
        assert launch_and_kill(how, ["train", *flags(words)], lambda: len(list(two.glob("checkpoint-*"))) >= moment)
    done = launch(how, tmp_path / "facts.json", words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr or not moment
    assert done.stderr.count(f"model in {'FSDPActorCritic' if how == 'fsdp' else 'DeepSpeedEngine'}") == 1
    assert done.stderr.count("each process has all weights") == (how != "zero2")
    assert furthest_of_all(one, two) < 1e-5
    check_log(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "zero3", "zero2"])
def test_in_16_bits_policy_and_reference_begin_as_one(tmp_path: Path, how: str) -> None:
    """They are computed alike, in shards and whole, so that no rounding stands in their divergence."""
    words = settings(tmp_path, "two", per_device_train_batch_size=2, bf16=True)
    done = launch(how, tmp_path / "facts.json", words)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [load_file(path) for path in (tmp_path / "two").glob("*.safetensors")]
    assert {weight.dtype for weights in found for weight in weights.values()} == {torch.float32}
    first, *_, last = lines(tmp_path / "two")
    assert abs(first["kl"]) < 1e-6 < 1e-2 < abs(last["kl"])


def furthest_of_all(one: Path, two: Path) -> float:
    """Largest difference between the weights that two runs have saved, of policy and critic."""
    files = [path for path in sorted(one.rglob("*.safetensors")) if "checkpoint" not in str(path.relative_to(one))]
    assert len(files) == 2
    pairs = [(load_file(path), load_file(two / path.relative_to(one))) for path in files]
    assert all(ours.keys() == theirs.keys() for ours, theirs in pairs)
    return max(float((ours[name] - theirs[name]).abs().max()) for ours, theirs in pairs for name in ours)


def check_equal(one: Path, two: Path) -> None:
    """Weights, critic and log of two processes are those of one, but for the order of float32 sums."""
    ours, theirs = trained(one / "checkpoint-3"), trained(two / "checkpoint-3")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    check_log(one, two)


def check_log(one: Path, two: Path) -> None:
    """The lines of two processes are those of one, which has learned something in its last step."""
    ours = trained(one / "checkpoint-3")
    before = trained(one / "checkpoint-2")
    assert max(float((ours[name] - before[name]).abs().max()) for name in ours) > 1e-3  # so the bound means something
    for line, other in zip(lines(one), lines(two), strict=True):
        assert other == pytest.approx(line, rel=2e-4, abs=2e-5)
    assert min(line["scored"] for line in lines(one)) < 1


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What trains of policy and critic, by name."""
    state = load_file(checkpoint / "state.safetensors")
    return {name: weight for name, weight in state.items() if name.startswith("weights.")}
