"""Warnings while training: planted series that must and must not be named, and what a run shows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.data.shares import clustered_wilson
from rankalign.evaluation.statistics import ratio_interval, wilson
from rankalign.training.arguments import parse_settings
from rankalign.training.diagnosis import WINDOW, diagnose
from rankalign.training.run import train

STEPS = 120


def healthy(**series: Any) -> list[dict[str, Any]]:
    """A log of a run that goes well, noise included; ``series`` maps a key to a function of the step."""
    rng = random.Random(0)
    lines = []
    for step in range(1, STEPS + 1):
        share = step / STEPS
        line: dict[str, Any] = {"step": step, "loss": 2 - share + rng.gauss(0, 0.1), "pairs": 40.0, "tied_pairs": 4.0}
        line |= {"margin": share + rng.gauss(0, 0.1), "best_logp": -1.5 + 0.3 * share + rng.gauss(0, 0.1)}
        line |= {"ranking_accuracy": 0.5 + 0.4 * share, "grad_norm": 3.0 - share + rng.gauss(0, 0.2)}
        lines.append(line | {name: value(share) for name, value in series.items()})
    return lines


def names(lines: list[dict[str, Any]]) -> list[str]:
    return [advice.name for advice in diagnose(lines)]


def test_a_healthy_run_is_not_disturbed_at_any_step() -> None:
    lines = healthy()
    assert all(names(lines[:k]) == [] for k in range(len(lines) + 1))


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("likelihood-displacement", {"best_logp": lambda t: -1.5 - t}),
        ("saturated", {"grad_norm": lambda t: 3 * 10 ** (-5 * t), "ranking_accuracy": lambda t: 1.0}),
        ("vanishing-gradient", {"grad_norm": lambda t: 3 * 10 ** (-5 * t)}),
        ("ties", {"tied_pairs": lambda t: 60.0}),
        ("chance", {"ranking_accuracy": lambda t: 0.5}),
    ],
)
def test_planted_trouble_is_named_alone(name: str, series: dict[str, Any]) -> None:
    found = diagnose(healthy(**series))
    assert [advice.name for advice in found] == [name]
    assert len(found[0].message) > 60


@pytest.mark.parametrize(
    "series",
    [
        {"best_logp": lambda t: -1.5 - t, "margin": lambda t: 1 - t},  # all fall, but the margin does not grow
        {"best_logp": lambda t: -1.5 - 0.05 * t},  # too little to matter
        {"best_logp": lambda t: -1.5 - 0.3 * t + (-1.0) ** round(STEPS * t)},  # within the noise
        {"grad_norm": lambda t: 3 - 2.9 * t},  # smaller, not gone
        {"tied_pairs": lambda t: 30.0},
        {"ranking_accuracy": lambda t: 0.58},
        {
            "ranking_accuracy": lambda t: 0.5,
            "pairs": lambda t: 1.0,
            "tied_pairs": lambda t: 0.0,
        },  # 20 pairs show nothing
    ],
)
def test_what_only_looks_like_trouble_is_not_named(series: dict[str, Any]) -> None:
    assert names(healthy(**series)) == []


def test_less_than_chance_asks_for_the_direction_of_scores() -> None:
    (advice,) = diagnose(healthy(ranking_accuracy=lambda t: 0.3))
    assert "lower score better" in advice.message


def test_a_short_run_says_nothing_about_chance() -> None:
    assert names(healthy(ranking_accuracy=lambda t: 0.5)[: 2 * WINDOW + 10]) == []


def test_held_out_accuracy_and_repetition() -> None:
    held_out = [
        {"step": step, "eval_loss": 1.0, "eval_accuracy_low": low, "eval_accuracy_high": high, "eval_repetition": rep}
        for step, low, high, rep in ((50, 0.45, 0.55, 0.02), (100, 0.46, 0.54, 0.30))
    ]
    assert names(held_out[:1]) == []
    assert names(held_out) == ["held-out-chance", "repetition"]
    held_out[1] |= {"eval_accuracy_low": 0.51, "eval_repetition": 0.1}
    assert names(held_out) == []


# --- the interval ------------------------------------------------------------------------------------------------


def test_one_pair_a_prompt_gives_wilsons_interval() -> None:
    right = [1.0] * 13 + [0.0] * 7
    assert clustered_wilson(right, [1.0] * 20) == pytest.approx(tuple(wilson(13, 20)), abs=1e-12)


def test_pairs_of_a_prompt_that_go_together_count_once() -> None:
    right = [6.0] * 13 + [0.0] * 7
    assert clustered_wilson(right, [6.0] * 20) == pytest.approx(tuple(wilson(13, 20)), abs=1e-12)
    assert clustered_wilson([6.0] * 20, [6.0] * 20) == pytest.approx(tuple(wilson(20, 20)), abs=1e-12)


def test_interval_agrees_with_the_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 11, size=400)
    right = rng.binomial(pairs, rng.beta(3, 2, size=400))
    low, high = clustered_wilson(right.tolist(), pairs.tolist()) or (0, 0)
    _, interval = ratio_interval(right, pairs)
    assert (low, high) == pytest.approx(tuple(interval), abs=0.004)


def test_no_pair_has_no_interval() -> None:
    assert clustered_wilson([0.0], [0.0]) is None


# --- in a run ----------------------------------------------------------------------------------------------------


def test_a_run_warns_once_on_stderr_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [
        CandidateSet(f"p{i}", f"say {i}", [Response(text, scores={"j": float(text == "a")}) for text in "abcd"])
        for i in range(22)
    ]
    write(tmp_path / "data.jsonl", sets)  # three pairs of six are tied
    sets = [CandidateSet(s.id, s.prompt, [*s.responses, Response("e", scores={"j": 0.0})]) for s in sets]
    write(tmp_path / "tied.jsonl", sets)  # six of ten
    lines = {}
    for name in ("data", "tied"):
        fixed = {"model": "tiny", "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 1, "save_strategy": "no"}
        fixed |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
        fixed |= {"data": str(tmp_path / f"{name}.jsonl"), "eval_data": str(tmp_path / "data.jsonl")}
        train(parse_settings({**fixed, "eval_strategy": "epoch", "output_dir": str(tmp_path / name)}))
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        lines[name] = [(line["step"], list(line["warnings"])) for line in log if "warnings" in line]
        held_out = next(line for line in log if "eval_loss" in line)
        assert held_out["eval_accuracy_low"] <= held_out["eval_ranking_accuracy"] <= held_out["eval_accuracy_high"]
    assert lines == {"data": [], "tied": [(WINDOW, ["ties"])]}
    assert capsys.readouterr().err.count("warning (ties)") == 1


# --- watching answers --------------------------------------------------------------------------------------------


def test_watched_answers_are_set_against_those_of_the_start(tmp_path: Path) -> None:
    from rankalign.evaluation.texts.while_training import Watch

    class Length:
        name = "length"

        def score(self, sets: list[CandidateSet]) -> list[list[float | None]]:
            return [[float(len(s.responses[0].text)) if s.responses[0].text else None] for s in sets]

    answers = {"start": ["aa", "bb", "cc", "", "dd"], "now": ["aaa", "b", "cc", "x", "go go go go go"]}
    prompts = [CandidateSet(f"p{k}", "q", []) for k in range(5)]
    watch = Watch(prompts, lambda model, sets: answers[model], Length(), "start")  # type: ignore[arg-type]
    found = watch("now")
    assert found["win_rate"] == 2.5 / 4  # two wins, a tie, a loss; the fourth had no score
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(tuple(wilson(2.5, 4)))
    assert found["watched"] == 4
    assert found["repetition"] == pytest.approx((1 - 1 / 3) / 5)
    assert watch("start")["win_rate"] == 0.5
    kept = Watch(prompts, lambda model, sets: answers[model], Length(), "start", tmp_path / "w.jsonl")  # type: ignore[arg-type]
    assert not (tmp_path / "w.jsonl").exists()
    assert kept("now") == found
    seen = [(r.id, [(x.policy, x.text, x.scores["watch"]) for x in r.responses]) for r in read(tmp_path / "w.jsonl")]
    assert seen[0] == ("p0", [("start", "aa", 2.0), ("now", "aaa", 3.0)])
    assert seen[3] == ("p3", [("start", "", None), ("now", "x", 1.0)])


def test_a_run_watches_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rankalign.cli import main

    texts = [("a" * 3, 1.0), ("b" * 3, 0.0)]
    sets = [CandidateSet(f"p{i}", f"say {i}", [Response(t, scores={"j": s}) for t, s in texts]) for i in range(4)]
    write(tmp_path / "data.jsonl", sets)
    (tmp_path / "grade.py").write_text(
        "def letters(s, prompts, outputs):\n    return [o.count('a') for o in outputs]\n"
    )
    flags = {"model": "tiny", "data": tmp_path / "data.jsonl", "eval_data": tmp_path / "data.jsonl", "use_cpu": True}
    flags |= {"output_dir": tmp_path / "run", "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    flags |= {"eval_strategy": "epoch", "watch": f"{tmp_path / 'grade.py'}:letters", "disable_tqdm": True}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in log if "eval_loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["eval_win_rate_low"] <= line["eval_win_rate"] <= line["eval_win_rate_high"]
        assert line["eval_watched"] == 4
        assert 0 <= line["eval_repetition"] <= 1
    kept = list(read(tmp_path / "run" / "watched.jsonl"))
    scores = [[response.scores["watch"] for response in record.responses] for record in kept]
    assert lines[-1]["eval_win_rate"] == sum((1 + (b > a) - (b < a)) / 2 for a, b in scores) / 4
    assert main(["train", *words, "--eval_strategy", "no"]) == 1
    assert "--watch needs" in capsys.readouterr().err
