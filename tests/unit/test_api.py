"""``rankalign.train``: which arguments ask for which training, and what the functions handed in are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rankalign
from rankalign import api
from rankalign.data.records import CandidateSet, Response, read
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.training.ilql.trainer import HEADS_FILE

FAST = {"model": "tiny", "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
PPO = {**FAST, "rollouts": 4, "per_device_train_batch_size": 4, "max_new_tokens": 4, "ppo_epochs": 1}


def trained(model: str = "tiny", **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = rankalign.train(model, **more)
    return found


def test_the_package_stays_light() -> None:
    code = "import sys, rankalign; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert rankalign.train is api.train
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = rankalign.trian


def test_a_function_of_samples_alone(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def reward_fn(samples: list[str]) -> list[float]:
        seen.append(samples)
        return [float(len(sample)) for sample in samples]

    evaluated = {"eval_prompts": ["who", {"prompt": "what"}]}
    result = trained(reward_fn=reward_fn, prompts=["a b", "c d"], output_dir=str(tmp_path / "run"), **evaluated, **PPO)
    assert all(sample.startswith(("a b", "c d")) for sample in seen[0])
    assert [sample[:3] for sample in seen[-1]] == ["who", "wha"]
    assert models.load_policy(result["output"]).config.model_type == "llama"
    assert result["eval"]["prompts"] == 2
    assert result["eval"]["reward_after"] == sum(map(len, seen[-1])) / 2
    assert result["eval"]["reward_before"] == sum(map(len, seen[-2])) / 2


def test_a_function_with_everything_and_a_number_a_token(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def reward_fn(samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any, **more: Any) -> Any:
        seen.update(more, tokenizer=tokenizer)
        assert samples == [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        return [[0.5, 0.25] for _ in outputs]

    prompts = [{"prompt": "a", "label": "x"}, {"prompt": "b", "label": "y"}]
    result = trained(reward_fn=reward_fn, prompts=prompts, config={**PPO, "output_dir": str(tmp_path / "run")})
    assert set(seen["label"]) <= {"x", "y"}
    assert seen["tokenizer"].vocab_size == 262
    assert result["metrics"]["reward"] == pytest.approx(0.75)


def test_samples_and_rewards_are_for_ilql(tmp_path: Path) -> None:
    more = {"output_dir": str(tmp_path / "a"), "max_steps": 1}
    result = trained(dataset=[("dolphins", "geese"), (1.0, 100.0)], **more)
    assert (Path(result["output"]) / HEADS_FILE).is_file()
    more["output_dir"] = str(tmp_path / "b")
    again = trained(samples=["dolphins", "geese"], rewards=[1.0, 100.0], **more)
    assert again["metrics"] == result["metrics"]


def test_records_are_for_ranking_and_samples_alone_for_sft(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "responses": ["one", "two"], "scores": [1.0, float(2 * i)]} for i in range(2)]
    result = trained(dataset=rows, output_dir=str(tmp_path / "rank"), **FAST)
    assert result["counts"]["pairs"] == 2
    assert "rank_loss" in (tmp_path / "rank" / "log.jsonl").read_text()
    fine = trained(samples=["all of it", ("question", "answer")], output_dir=str(tmp_path / "sft"), **FAST)
    assert fine["counts"]["prompts"] == 2
    assert [record.prompt for record in read(tmp_path / "sft.data.jsonl")] == ["<|bos|>", "question"]


def test_a_file_and_old_names_and_own_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = CandidateSet("p", "q", [Response("a", scores={"j": 1.0}), Response("b", scores={"j": 0.0})])
    config = api._parsed({"model": "tiny", "data": "f.jsonl", "warmup_ratio": 0.1, "use_cpu": True})
    assert config.warmup_steps == 0.1
    assert "--warmup_ratio 0.1 is now --warmup_steps 0.1" in capsys.readouterr().err
    result = trained(dataset=[record], output_dir=str(tmp_path / "run"), loss="dpo", **FAST)
    assert trained(dataset=tmp_path / "run.data.jsonl", output_dir=str(tmp_path / "run"), loss="dpo", **FAST)[
        "already_finished"
    ]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"] == result["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of reward_fn, dataset and samples"),
        ({"reward_fn": len, "dataset": "f"}, "one of reward_fn, dataset and samples"),
        ({"dataset": "f", "rewards": [1.0]}, "one of reward_fn, dataset and samples"),
        ({"dataset": "f", "prompts": ["a"]}, "belong to reward_fn"),
        ({"reward_fn": len, "prompts": []}, "there are no prompts"),
        ({"reward_fn": len, "prompts": [{"text": "a"}]}, "needs the key prompt, found text"),
        ({"reward_fn": len, "method": "sft"}, "ask for method ppo"),
        ({"dataset": "f", "method": "ppo"}, "method ppo needs reward_fn"),
        ({"samples": ["a"], "rewards": [1.0], "taus": 0.5}, "ILQL has no setting 'taus' (did you mean 'tau'?)"),
        ({"samples": ["a"], "rewards": [1.0], "tau": 2}, "tau is a share from 0 to 1"),
        ({"dataset": "f", "learning_rat": 1}, "rankalign.train: unknown setting 'learning_rat'"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        trained(output_dir=str(tmp_path / "run"), **arguments)
    assert message in str(caught.value)
