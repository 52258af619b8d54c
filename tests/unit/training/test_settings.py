"""The groups of a run's settings: read without torch, one flag each, and enough for whoever has no TrainConfig."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.rows.logps import list_logps
from rankalign.training.arguments import TrainConfig, parse_settings
from rankalign.training.inputs import choose_layout, load_data, load_model, references_of
from rankalign.training.settings import GROUPS, DataSettings, LossSettings, ModelSettings, RunSettings


def test_help_texts_need_no_torch() -> None:
    code = "import sys, rankalign.training.help as h; print(h.group('run'), {'torch', 'transformers'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.endswith(" set()\n")
    assert "--token_budget " in told


def test_each_field_of_a_group_is_one_flag_with_its_default() -> None:
    config = parse_settings({"use_cpu": True})
    names = [item.name for group in GROUPS for item in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    for group in GROUPS:
        for item in dataclasses.fields(group):
            if item.default is not None or item.name not in ("learning_rate", "bf16", "tf32"):  # chosen by loss, device
                assert getattr(config, item.name) == item.default, item.name
    told = [config.model_settings, config.data_settings, config.loss_settings, config.run_settings]
    assert told == [ModelSettings(), DataSettings(), LossSettings(), RunSettings()]
    assert dataclasses.is_dataclass(TrainConfig)


def test_model_data_layout_and_reference_without_training_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "scored.jsonl"
    answers = [Response("yes", scores={"j": 1.0}), Response("no", scores={"j": 0.0})]
    write(path, [CandidateSet("a", "Is it?", answers)])
    of_model, loss = ModelSettings(model="tiny"), LossSettings(loss="dpo")
    tokenizer = models.load_tokenizer("tiny")
    lists, held_out, counts = load_data(DataSettings(data=str(path)), loss, tokenizer)
    model = load_model(of_model, tokenizer)
    layout, _ = choose_layout("auto", model, lists)
    found = references_of(of_model, loss, "float32", model, layout, [*lists, *held_out])
    expected = list_logps(models.load_policy("tiny", dtype="float32"), [lists[0].prompt], [lists[0].responses])[0]
    assert counts["pairs"] == 1
    assert found[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelSettings(use_dora=True),
        lambda: DataSettings(only_use_provide=True, only_use_sample=True),
        lambda: LossSettings(loss="nosuch"),
        lambda: RunSettings(token_budget=0),
    ],
)
def test_a_group_refuses_its_own_contradictions(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"loss": "dpo", "loss_options": {"beta": "x"}}, r"loss 'dpo': beta is a number \(0.1 by itself\), found 'x'"),
        ({"loss": "dpo", "loss_options": {"beta": True}}, "found True"),
        ({"loss": "dpo", "loss_options": {"label_smoothing": [1]}}, r"label_smoothing is a number .*found \[1\]"),
        ({"optim_args": "nonsense"}, "--optim_args 'nonsense': write NAME=VALUE"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "--optim sgd --optim_args momentum=x: could not convert"),
    ],
)
def test_values_of_the_wrong_kind_are_named(words: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_settings({"use_cpu": True, **words}).loss_keywords()


def test_one_candidate_of_each_prompt_is_the_reason(tmp_path: Path) -> None:
    answers = [Response("a b", scores={"j": 1.0}), Response("c d", scores={"j": 2.0})]
    write(tmp_path / "d.jsonl", [CandidateSet("p", "Why?", answers)])
    of_data = DataSettings(data=str(tmp_path / "d.jsonl"), max_candidates=1, token_cache="off")
    with pytest.raises(InputError, match="--max_candidates 1 leaves one response of each"):
        load_data(of_data, LossSettings(loss="dpo"), models.load_tokenizer("tiny"))
