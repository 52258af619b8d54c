"""Equal weights under other settings are another model: for the cache of references, for runs, for what was sampled."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, to_dict
from rankalign.engines import Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.adapters import add_lora
from rankalign.models.identity import config_of, text_of
from rankalign.scorers.reward_model import RewardModelScorer
from rankalign.storage.jsonl import write_rows
from rankalign.training.arguments import TrainConfig
from rankalign.training.run import train


def changed(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models.resolve("tiny"), tmp_path / "model"))


def test_what_changes_numbers_counts_and_nothing_else(model: Path, tmp_path: Path) -> None:
    before, weights = config_of(str(model)), models.weights_of(str(model))
    changed(model, transformers_version="1.0", torch_dtype="bfloat16", _name_or_path="/elsewhere")
    assert config_of(str(model)) == before
    assert config_of(str(shutil.copytree(model, tmp_path / "copy"))) == before
    told = json.loads((model / "config.json").read_text())
    rope = {**told["rope_parameters"], "rope_theta": 77.0}
    changed(model, rope_parameters=rope)
    assert config_of(str(model)) != before
    assert models.weights_of(str(model)) == weights
    settings = policy_settings(Policy("p", "hf", str(model)))
    assert settings["model_config_sha256"] == config_of(str(model))


def edit_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text("Be odd. " + path.read_text())


def edit_ends(model: Path) -> None:
    changed(model, "generation_config.json", eos_token_id=[2, 11])


def edit_rules(model: Path) -> None:
    """Every text becomes other tokens."""
    path = model / "tokenizer.json"
    told = json.loads(path.read_text())
    told["normalizer"] = {"type": "Prepend", "prepend": "x"}
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(("edit", "grades"), [(edit_template, True), (edit_rules, True), (edit_ends, False)])
def test_how_text_becomes_tokens_counts(model: Path, tmp_path: Path, edit: Any, grades: bool) -> None:
    """For what was sampled and, but for where answers end, for grades; weights and config are the same."""
    write_rows(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Why?", "responses": []}])
    policies = [{"name": "p", "engine": "hf", "model": str(model), "max_new_tokens": 2}]
    settings = {"prompts": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / "out.jsonl"), "policies": policies}
    (tmp_path / "sample.yaml").write_text(json.dumps(settings))
    scorer, words = RewardModelScorer("rm", str(model)), ["sample", "--config", str(tmp_path / "sample.yaml")]
    before, graded = policy_settings(Policy("p", "hf", str(model))), scorer.fingerprint()
    assert main(words) == 0
    edit(model)
    after = policy_settings(Policy("p", "hf", str(model)))
    assert {key for key in after if after[key] != before[key]} == {"text_sha256"}
    assert (scorer.fingerprint() != graded) == grades
    assert main(words) == 1


def test_an_adapter_reads_text_as_its_base_does(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    add_lora(models.load_policy(str(model)), r=2, alpha=4).save_pretrained(adapter)
    changed(adapter, "adapter_config.json", base_model_name_or_path=str(model))
    before = text_of(str(adapter))
    assert before == text_of(str(model)) != ""
    edit_ends(model)
    assert text_of(str(adapter)) != before
    assert text_of("nobody/nothing") == ""


def test_an_adapter_counts_with_its_scale_and_its_base(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    lora = add_lora(models.load_policy(str(model)), r=2, alpha=4)
    lora.save_pretrained(adapter)
    changed(adapter, "adapter_config.json", base_model_name_or_path=str(model))
    before = config_of(str(adapter))
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    changed(adapter, "adapter_config.json", target_modules=names[::-1])
    assert config_of(str(adapter)) == before
    other = shutil.copytree(model, tmp_path / "other")
    changed(other, rms_norm_eps=0.5)
    changed(adapter, "adapter_config.json", base_model_name_or_path=str(other))
    assert config_of(str(adapter)) != before
    changed(adapter, "adapter_config.json", base_model_name_or_path=str(model), lora_alpha=8)
    assert config_of(str(adapter)) != before


def test_references_and_runs_are_of_one_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    answers = [Response("yes indeed", scores={"rm": 1.0}), Response("no", scores={"rm": 0.0})]
    rows = [to_dict(CandidateSet(f"p{i}", f"Is {i} a number?", answers)) for i in range(4)]
    write_rows(tmp_path / "data.jsonl", rows)

    def run(output: str) -> dict[str, Any]:
        config = TrainConfig(
            output_dir=str(tmp_path / output), data=str(tmp_path / "data.jsonl"), model=str(model), loss="dpo",
            judge="rm", max_steps=1, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        return train(config)

    assert run("a")["metrics"]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
    told = json.loads((model / "config.json").read_text())
    changed(model, rope_parameters={**told["rope_parameters"], "rope_theta": 77.0})
    # Their log-probabilities differ, so that a reference of the other would show in the first loss.
    assert run("b")["metrics"]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(InputError, match="model_config_sha256"):
        run("a")
