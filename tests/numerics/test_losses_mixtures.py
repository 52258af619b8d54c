"""Losses with a likelihood term, and weighted sums of losses: values, gradients, parts, keywords, spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.lists import lists, padded, random_list, value_and_gradient

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.losses import LOSSES, sft
from rankalign.losses.core import Loss
from rankalign.losses.mixtures import compose, mixture, parse
from rankalign.training.arguments import parse as parse_flags
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train

FIXED = ["--model", "tiny", "--use_cpu", "True", "--output_dir", "unused"]


def mixed(text: str) -> Loss:
    return mixture(parse(text), LOSSES)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_nll_of_the_best_is_added_with_its_weight(name: str, reduction: str) -> None:
    ranked, loss = padded(lists()), LOSSES[name]
    plain, slope = value_and_gradient(loss.function(ranked), ranked.logps)
    likelihood, rise = value_and_gradient(sft(ranked, sft_reduction=reduction), ranked.logps)
    keywords = {"nll_weight": 0.3, "nll_reduction": reduction}
    value, gradient = value_and_gradient(loss.function(ranked, **keywords), ranked.logps)
    torch.testing.assert_close(value, plain + 0.3 * likelihood, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, slope + 0.3 * rise, atol=1e-12, rtol=1e-12)
    parts = loss.parts(ranked, **keywords)
    torch.testing.assert_close(parts["nll_loss"].detach(), likelihood, atol=0, rtol=0)
    assert set(parts) > {"nll_loss"}
    assert "nll_loss" not in loss.parts(ranked)
    assert torch.equal(loss.function(ranked, nll_weight=0.0).detach(), plain)


@pytest.mark.parametrize("keywords", [{"nll_weight": -0.1}, {"nll_reduction": "token"}])
def test_bad_likelihood_terms(keywords: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(keywords))):
        LOSSES["dpo"].function(padded(lists()), **keywords)


@pytest.mark.parametrize(
    "text", ["dpo+0.2*sft+0.1*bco", "0.8*dpo+0.2*bco+sft", "rrhf+2*plackett_luce", "hinge + 1e-1*pro"]
)
def test_a_mixture_is_the_weighted_sum_of_its_parts(text: str) -> None:
    ranked, loss = padded(lists()), mixed(text)
    value, gradient = value_and_gradient(loss.function(ranked), ranked.logps)
    expected, slope = torch.zeros_like(value), torch.zeros_like(gradient)
    for name, weight in parse(text).items():
        part, rise = value_and_gradient(LOSSES[name].function(ranked), ranked.logps)
        expected, slope = expected + weight * part, slope + weight * rise
        assert torch.equal(loss.parts(ranked)[name].detach(), part)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-12, rtol=1e-12)
    assert loss.parts(ranked).keys() == parse(text).keys()


def test_keywords_go_to_all_that_have_them_or_to_one() -> None:
    ranked, loss = padded([random_list(4, 1)]), mixed("dpo+0.5*bco+sft")
    found = loss.function(ranked, **{"beta": 0.3, "bco.beta": 0.7, "sft_reduction": "sum"})
    dpo, bco = LOSSES["dpo"].function(ranked, beta=0.3), LOSSES["bco"].function(ranked, beta=0.7)
    torch.testing.assert_close(found, dpo + 0.5 * bco + sft(ranked, sft_reduction="sum"), atol=1e-12, rtol=0)
    assert loss.defaults["beta"] == 0.1
    assert loss.defaults["bco.beta"] == 0.01


def test_what_a_mixture_needs() -> None:
    assert mixed("sft+simpo").needs_reference is False
    assert mixed("sft+dpo").needs_reference is True
    assert mixed("sft+dpo").needs_pairs({}) is True
    assert mixed("2*sft+raft").needs_pairs({}) is False
    assert mixed("sft+kto").needs_pairs({"threshold": 0.5}) is False
    assert mixed("dpo+kto").needs_pairs({"kto.threshold": 0.5}) is True
    assert mixed("1.0*dpo") is LOSSES["dpo"]


@pytest.mark.parametrize(
    "text",
    ["", "+", "dpo+", "dpo+dpo", "0*dpo", "dpo-sft", "dpo sft", "0.2sft", "*sft", "1.2.3*sft", "1e999*sft", "-1*sft"],
)
def test_what_is_no_mixture(text: str) -> None:
    with pytest.raises(InputError, match="loss"):
        parse(text)


@pytest.mark.parametrize(
    ("listed", "weights", "expected"),
    [
        (["dpo", "sft"], None, ("dpo+sft", {})),
        (["dpo", "sft"], [1, "0.2"], ("dpo+0.2*sft", {})),
        (
            ["dpo", {"sft": 0.2}, {"loss": "bco", "weight": 0.1, "beta": 0.05}],
            None,
            ("dpo+0.2*sft+0.1*bco", {"bco.beta": 0.05}),
        ),
        (["0.3*dpo", "hinge"], None, ("0.3*dpo+hinge", {})),
    ],
)
def test_lists_as_text(listed: list[Any], weights: list[Any] | None, expected: tuple[str, dict[str, Any]]) -> None:
    assert compose(listed, weights) == expected


@pytest.mark.parametrize(
    ("listed", "weights"),
    [
        ([], None),
        (["dpo"], [1, 2]),
        ([{"dpo": 1}], [1]),
        ([{"dpo": "x"}], None),
        ([3], None),
        (["dpo", "dpo"], None),
        ([{"dpo": 1, "sft": 2}], None),
    ],
)
def test_lists_that_are_refused(listed: list[Any], weights: list[Any] | None) -> None:
    with pytest.raises(InputError, match="loss"):
        compose(listed, weights)


@pytest.mark.parametrize(
    ("flags", "loss", "keywords"),
    [
        (["--loss", "dpo+0.2*sft", "--beta", "0.3"], "dpo+0.2*sft", {"beta": 0.3}),
        (["--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", "0.8", "0.2", "1"], "0.8*dpo+0.2*bco+sft", {}),
        (["--loss_type", "sigmoid", "--rpo_alpha", "0.5"], "dpo", {"nll_weight": 0.5}),
        (["--loss_type", "ipo", "--loss_weights", "2"], "2.0*ipo", {}),
        (["--loss_type", "sigmoid", "--ld_alpha", "0.3"], "ld_dpo", {"alpha": 0.3}),
        (["--loss_type", "sigmoid", "--use_weighting", "True", "--beta", "0.2"], "wpo_aligned", {"beta": 0.2}),
        (["--loss_type", "ipo", "--use_weighting", "False"], "ipo", {}),
        (
            ["--loss", "dpo+bco", "--bco.delta", "0.1", "--nll_weight", "0.5"],
            "dpo+bco",
            {"bco.delta": 0.1, "nll_weight": 0.5},
        ),
    ],
)
def test_flags(flags: list[str], loss: str, keywords: dict[str, Any]) -> None:
    config, _ = parse_flags(None, [*flags, *FIXED])
    assert (config.loss, config.loss_keywords()) == (loss, keywords)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "dpo+sfft"], "did you mean 'sft'"),
        (["--loss", "dpo", "sft", "--loss_weights", "1"], "one weight for each"),
        (["--loss", "dpo+sft", "--tau", "1"], "no such option"),
        (["--loss_type", "ipo", "--ld_alpha", "0.3"], "makes another loss of TRL's sigmoid"),
        (["--loss_type", "sigmoid", "--ld_alpha", "0.3", "--use_weighting", "True"], "makes another loss"),
        (["--loss", "dpo+sft", "--loss_options", '{"dpo.tau": 1}'], "dpo.beta"),
        (["--loss", "dpo+bco", "--loss_options", '{"bco.beta": 0}'], "no preference left"),
        (["--loss", "bradley_terry+plackett_luce", "--method", "reward"], "unknown loss"),
    ],
)
def test_flags_that_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_flags(None, [*flags, *FIXED])


def test_yaml_lists(tmp_path: Path) -> None:
    path = tmp_path / "mpo.yaml"
    path.write_text(
        "loss:\n  - {dpo: 0.8}\n  - {loss: bco, weight: 0.2, delta: 0.3}\n  - sft\nmodel: tiny\nuse_cpu: true\n"
    )
    config, _ = parse_flags(str(path), ["--output_dir", "unused"])
    assert (config.loss, config.loss_keywords()) == ("0.8*dpo+0.2*bco+sft", {"bco.delta": 0.3})
    path.write_text("loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.5]\nmodel: tiny\nuse_cpu: true\n")
    assert parse_flags(str(path), ["--output_dir", "unused"])[0].loss == "dpo+0.5*sft"


def test_a_run_logs_each_part_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    answers = [Response("blue", scores={"j": 1.0}), Response("red and red", scores={"j": 0.0})]
    write(tmp_path / "pairs.jsonl", [CandidateSet("1", "say blue", answers)])
    fixed = {
        "model": "tiny",
        "data": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
    }
    held_out = {"eval_data": fixed["data"], "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "bco"}
    more = {"max_steps": 1, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    train(parse_settings({**fixed, **held_out, **more, "loss": ["dpo", {"sft": 0.2}, {"bco": 0.1}]}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for prefix in ("", "eval_"):
        row = next(row for row in rows if f"{prefix}dpo" in row)
        total = row[f"{prefix}dpo"] + 0.2 * row[f"{prefix}sft"] + 0.1 * row[f"{prefix}bco"]
        assert row[f"{prefix}loss"] == pytest.approx(total, rel=1e-6)
