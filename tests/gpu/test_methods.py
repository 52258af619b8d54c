"""The other ways to train, whole runs on a GPU in the numerics that they choose there."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.config import build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.models import load as models
from rankalign.recipes.iterate import IterateConfig, run
from rankalign.training.ilql.trainer import settings_of, train_ilql

REWARD = """
def share(samples, prompts, outputs, **_):
    return [sum('a' <= c <= 'z' for c in o) / max(len(o), 1) for o in outputs]
"""


@pytest.fixture(autouse=True)
def _device_again() -> Any:
    yield
    models.stay_on_cpu(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    sets = [CandidateSet(f"p{i}", f"prompt {i}", [Response("The sea.", "human")]) for i in range(4)]
    write(tmp_path / "prompts.jsonl", sets)
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--use_lora"], ["--bf16", "False"]])
def test_ppo(flags: list[str], folder: Path, capsys: Any) -> None:
    words = ["train", "--json", "--method", "ppo", "--model", "tiny", "--data", str(folder / "prompts.jsonl")]
    words += ["--rollouts", "8", "--max_new_tokens", "4", "--max_steps", "2", "--template", "raw"]
    words += ["--output_dir", str(folder / "run"), "--reward", f"{folder}/reward.py:share", *flags]
    assert main(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["steps"] == 2
    assert ("bf16 True" in said.err) is ("--bf16" not in flags)


def test_ilql(tmp_path: Path) -> None:
    told = {"model": "tiny", "output_dir": str(tmp_path / "run"), "max_steps": 2}
    assert train_ilql(["dolphins", "geese"], [1.0, 100.0], settings_of(told))["steps"] == 2


@pytest.mark.parametrize("more", [{"rounds": 2}, {"refresh_every": 1}])
def test_iterate(more: dict[str, Any], folder: Path) -> None:
    """Rounds of sampling, scoring and training, and a policy that is refreshed under way."""
    told: dict[str, Any] = {
        "output": str(folder / "out"),
        "prompts": str(folder / "prompts.jsonl"),
        "model": "tiny",
        **more,
    }
    told["policies"] = [
        {"name": "own", "n": 2, "temperature": 1.0, "max_new_tokens": 4}, {"name": "human", "engine": "replay"},
    ]  # fmt: skip
    told["scorers"] = [{"name": "share", "kind": "function", "function": f"{folder}/reward.py:share"}]
    told["train"] = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    told["train"] |= {"save_steps": 1, "disable_tqdm": True}
    result = run(build(IterateConfig, {**told, "judge": "share"}, "test"))
    assert sum(row["steps"] for row in result["rounds"]) == 4 if "rounds" in more else len(result["rounds"]) == 2


def test_a_reward_model_scores_by_tokens_and_says_what_rounding_decides(folder: Path, capsys: Any) -> None:
    answers = [Response(f"the sea {word}", f"p{i}") for i, word in enumerate(["is", "blue", "was", "old", "and", "so"])]
    write(folder / "many.jsonl", [CandidateSet(f"p{i}", f"prompt {i}", answers) for i in range(12)])
    (folder / "score.yaml").write_text("scorers: [{name: rm, kind: reward_model, model: tiny-rm}]\n")
    words = ["score", "--json", "--config", str(folder / "score.yaml"), "--input", str(folder / "many.jsonl")]
    assert main([*words, "--output", str(folder / "scored.jsonl")]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)["within_rounding"]["rm"]
    print("FOUND", found)
    rows = [[r.scores["rm"] for r in record.responses] for record in read(folder / "scored.jsonl")]
    pairs = [(a, b) for row in rows for a, b in itertools.combinations(row, 2) if a != b]
    assert found == sum(bfloat16(a) == bfloat16(b) for a, b in pairs)  # by bytes, and not by torch
    assert (f"{found} of 180 pairs differ by less than bfloat16" in said.err) is bool(found)


def bfloat16(value: float) -> int:
    """The upper half of a float32's bits, rounded to nearest, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
