"""The whole experiment on the tiny model: RRHF raises a synthetic reward, and a rerun does nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, read, write

REWARD = """
def share(samples, prompts, outputs, **meta):
    return [sum('a' <= c <= 'z' for c in o) / max(len(o), 1) for o in outputs]
"""
KEYS = {
    "reward_before", "reward_after", "difference", "ci95", "n_prompts", "seed", "train_mean_reward", "train_max_reward",
    "perplexity_before", "perplexity_after", "repetition_before", "repetition_after", "length_before", "length_after",
    "seconds",
}  # fmt: skip


def config(folder: Path, **more: Any) -> Path:
    rng = random.Random(0)
    for name, count in (("train", 24), ("heldout", 16)):
        words = [" ".join(rng.choices(["red", "blue", "old", "new", "cat", "sea"], k=3)) for _ in range(count)]
        write(folder / f"{name}.jsonl", [CandidateSet(f"{name}{i}", text) for i, text in enumerate(words)])
    (folder / "reward.py").write_text(REWARD)
    settings = {
        "output": str(folder / "run"),
        "prompts": str(folder / "train.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "model": "tiny",
        "judge": "share",
        "scorers": [{"name": "share", "kind": "function", "function": f"{folder}/reward.py:share"}],
        "policies": [{"name": "t1", "n": 6, "temperature": 1.0, "max_new_tokens": 16}],
        "answer": {"temperature": 1.0, "n": 4, "max_new_tokens": 16},
        "train": {
            "learning_rate": 2e-2, "num_train_epochs": 8, "lr_scheduler_type": "constant", "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1, "use_cpu": True, "save_strategy": "no", "warmup_steps": 0,
            "loss_options": {"sft_reduction": "mean"},
        },
        **more,
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / "c.yaml"


@pytest.mark.parametrize("seed", range(5))
def test_rrhf_raises_the_reward(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, seed=seed)
    assert main(["run", "--config", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ci95"][0] > 0
    assert result["reward_after"] - result["reward_before"] == pytest.approx(result["difference"], abs=1e-9)
    assert result["train_mean_reward"] <= result["train_max_reward"]
    assert json.loads((tmp_path / "run/result.json").read_text()).keys() >= KEYS
    if seed == 0:
        check_files(tmp_path)
        check_rerun(path, tmp_path, capsys)


def check_files(folder: Path) -> None:
    """The numbers of result.json, from the files beside it and plain arithmetic."""
    result = json.loads((folder / "run/result.json").read_text())
    for name in ("before", "after"):
        sets = list(read(folder / f"run/{name}.jsonl"))
        assert [record.id for record in sets] == [f"heldout{i}" for i in range(16)]
        per_prompt = []
        for record in sets:
            drawn = [
                sum("a" <= c <= "z" for c in r.text) / max(len(r.text), 1)
                for r in record.responses
                for _ in range(r.count)
            ]
            assert len(drawn) == 4
            per_prompt.append(sum(drawn) / 4)
        assert result[f"reward_{name}"] == pytest.approx(sum(per_prompt) / 16, abs=1e-12)
    page = (folder / "run/report.html").read_text()
    assert "<title>" in page
    assert not re.findall(r"(?:src|href)=.?https?:", page)


def check_rerun(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {p: p.stat().st_mtime_ns for p in (folder / "run").glob("*.jsonl")}
    assert main(["run", "--config", str(path)]) == 0
    assert capsys.readouterr().err.count("nothing to do") >= 6
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").glob("*.jsonl")} == kept
