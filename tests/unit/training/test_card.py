"""The model card: what it says, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import yaml

from rankalign.training.card import write_card

SETTINGS = {"loss": "rrhf", "learning_rate": 2e-5, "judge": "<b>|`x`", "data_sha256": ["ab"], "template": ""}
FACTS = {"steps": 7, "counts": {"prompts": 3, "tied": 0}, "metrics": {"loss": 1.23456789, "note": None}}


def card(folder: Path, method: str = "rank", model: str = "default", data: str = "scored.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    return write_card(folder, method, model, data, SETTINGS, FACTS).read_text(encoding="utf-8")


def test_the_head_is_yaml_that_hubs_read(tmp_path: Path) -> None:
    head = yaml.safe_load(card(tmp_path / "m").split("---\n")[1])
    assert head == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["rankalign", "rank", "rrhf"],
    }


def test_figures_are_those_of_the_run(tmp_path: Path) -> None:
    text = card(tmp_path / "m")
    for row in ("| updates | 7 |", "| prompts | 3 |", "| loss | 1.23457 |", "| learning_rate | 2e-05 |"):
        assert row in text
    assert "note" not in text
    assert "template" not in text


def test_folders_of_this_machine_are_not_told(tmp_path: Path) -> None:
    base = tmp_path / "secret-place" / "base"
    base.mkdir(parents=True)
    text = card(tmp_path / "m", model=str(base), data=str(tmp_path / "scored.jsonl"))
    assert str(tmp_path) not in text
    assert "`base`" in text
    assert "`scored.jsonl`" in text


def test_text_of_the_user_is_no_markup(tmp_path: Path) -> None:
    assert "| judge | &lt;b>\\|'x' |" in card(tmp_path / "m")


def test_each_kind_says_how_to_load_it(tmp_path: Path) -> None:
    assert "AutoModelForCausalLM" in card(tmp_path / "a")
    assert "AutoModelForSequenceClassification" in card(tmp_path / "b", "reward")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert "AutoPeftModelForCausalLM" in card(tmp_path / "a")


def test_a_hub_finds_base_data_sets_and_results(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    facts = {**FACTS, "evaluation": {"ranking_accuracy": 0.75, "pairs": 8, "loss": 0.5}}
    data = "org/prefs:train#500,org/more*2,gone/scored.jsonl"
    text = write_card(folder, "rank", "org/base", data, SETTINGS, facts).read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "adapter")
    assert head["datasets"] == ["org/prefs", "org/more"]
    (told,) = head["model-index"]
    results = {m["type"]: m["value"] for result in told["results"] for m in result["metrics"]}
    assert results == {"ranking_accuracy": 0.75, "loss": 0.5}  # counts are no results
    assert "on `org/prefs, org/more, scored.jsonl`" in text
    assert "| ranking_accuracy | 0.75 |" in text
