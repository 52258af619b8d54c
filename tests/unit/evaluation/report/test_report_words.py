"""What the report says in plain words, what it marks between two answers, and the texts of examples it doubts."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.evaluation.report import summary
from rankalign.evaluation.report.example_texts import texts_of
from rankalign.evaluation.report.hack import find_hacks
from rankalign.evaluation.report.marks import marked
from rankalign.evaluation.report.page import write_report
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.storage import manifest
from rankalign.storage.jsonl import write_rows
from tests.unit.evaluation.report.test_report import HOSTILE, held_out

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def compared(gains: list[float], text: str = "plain words here") -> Run:
    n = len(gains)
    before = held_out(["plain words here"] * n, [0.0] * n, "start")
    return Run("r", before=before, after=held_out([text] * n, gains, "trained"), judge="rm")


@pytest.mark.parametrize(
    ("gains", "lead"),
    [
        ([1.0] * 45 + [-1.0] * 12 + [0.0] * 7,
         "The model got better on 45 of 64 held-out prompts and worse on 12, with the same score on 7."),
        ([-1.0] * 5 + [1.0] * 2,
         "The model got worse on 5 of 7 held-out prompts and better on 2, which may be chance."),
        ([1.0] * 6, "The model got better on all 6 held-out prompts."),
        ([0.0] * 6, "The model scored the same on all 6 held-out prompts."),
    ],
)  # fmt: skip
def test_the_lead_counts_prompts(gains: list[float], lead: str) -> None:
    found = summary.headline(compared(gains), [])
    assert found is not None
    assert found.lead == lead
    up, same = sum(g > 0 for g in gains), sum(g == 0 for g in gains)
    assert found.win_rate == pytest.approx((up + same / 2) / len(gains))
    assert found.win_bounds is not None
    assert found.win_bounds[0] <= found.win_rate <= found.win_bounds[1]


def test_a_win_on_every_prompt_is_not_certain() -> None:
    found = summary.headline(compared([1.0] * 6), [])
    assert found is not None
    assert found.win_bounds is not None
    assert found.win_bounds[0] == pytest.approx(0.025 ** (1 / 6))  # Clopper-Pearson, all of n successes


def test_bad_habits_stand_beside_the_gain() -> None:
    run = compared([1.0] * 20, "so good so good so good so good so good")
    flags = find_hacks(run.before, run.after, run.judge)
    found = summary.headline(run, flags)
    assert found is not None
    assert {flag.name for flag in flags} >= {"repetition", "length"}
    assert found.lead.startswith("The model got better on all 20 held-out prompts; it also writes longer answers, ")
    assert "repeats itself more" in found.lead
    assert found.tone == "doubt"
    assert any("percentage points" in flag.message for flag in flags if flag.name == "repetition")


def test_every_flag_has_words() -> None:
    from rankalign.evaluation.report import hack

    named = {probe.flag for probe in hack.WATCHED} | {"mode-collapse", "stock-phrase", "reward-follows-length"}
    assert named == set(summary.HABITS)


def test_a_run_without_answers_says_what_it_cannot_say(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 3.0 / step, "ranking_accuracy": 0.5 + step / 100} for step in range(1, 31)]
    write_rows(tmp_path / "log.jsonl", rows)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    wanted = (
        "Training took 30 steps; ranking accuracy went from 0.51 to 0.8. It has no held-out answers from before and "
        "after, so nothing here says whether those got better."
    )
    assert wanted in html
    held = [*rows, {"step": 30, "eval_ranking_accuracy": 0.6}, {"step": 31, "eval_ranking_accuracy": 0.7}]
    assert "took 31 steps; ranking accuracy on held-out data went from 0.6 to 0.7" in summary.training_alone(
        Run("r", log=held)
    )
    assert summary.training_alone(Run("r", log=[{"step": 1, "loss": 1.0}])).startswith(
        "Training took 1 step. It has no"
    )
    assert summary.training_alone(Run("r")) == ""


# --- the best checkpoint -----------------------------------------------------------------------------------------


def log_of(**series: list[float]) -> list[dict[str, Any]]:
    rows = zip(*series.values(), strict=True)
    return [{"step": 10 * (k + 1), **dict(zip(series, row, strict=True))} for k, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("settings", "metric", "step"),
    [
        ({}, "ranking_accuracy", 20),
        ({"metric_for_best_model": "loss"}, "loss", 30),
        ({"metric_for_best_model": "eval_margin", "greater_is_better": False}, "margin", 10),
    ],
)
def test_the_best_checkpoint_by_the_runs_own_measure(settings: dict[str, Any], metric: str, step: int) -> None:
    log = log_of(
        eval_loss=[3.0, 2.0, 1.0, 2.0], eval_ranking_accuracy=[0.5, 0.8, 0.8, 0.7], eval_margin=[0.0, 1.0, 2.0, 3.0]
    )
    best = summary.best_checkpoint([{"step": 5, "loss": 1.0}, *log], settings, {20: "model/checkpoint-20"})
    assert best is not None
    assert (best.metric, best.step, best.measured, best.last_step) == (metric, step, 4, 40)
    if step == 20:
        assert best.sentence() == (
            "The best checkpoint is that of step 20: held-out ranking accuracy 0.8, 0.7 at the last measurement "
            "(step 40). It lies in model/checkpoint-20."
        )
    else:
        assert "It was not kept." in best.sentence()


def test_one_measurement_is_no_choice() -> None:
    assert summary.best_checkpoint([{"step": 5, "eval_loss": 1.0}], {}, {}) is None
    assert summary.best_checkpoint([{"step": 5, "loss": 1.0}, {"step": 6, "loss": 1.0}], {}, {}) is None
    loaded = summary.best_checkpoint(log_of(eval_loss=[1.0, 2.0]), {"load_best_model_at_end": True}, {})
    assert loaded is not None
    assert loaded.sentence().endswith("The run went back to it at its end.")


# --- marks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "was", "now"),
    [
        ("I am so sorry to hear it.", "I am glad to hear it!", ["so sorry ", "."], ["glad ", "!"]),
        ("one two three", "one two three four", [], ["four"]),
        ("今天天气很好", "今天天气不好", ["很"], ["不"]),
        ("a  b\n\nc d e", "a b\n\nc d  e", [], []),
    ],
)  # fmt: skip
def test_marks_by_hand(a: str, b: str, was: list[str], now: list[str]) -> None:
    found = marked(a, b)
    assert found is not None
    assert [text for text, own in found[0] if own] == was
    assert [text for text, own in found[1] if own] == now


def test_parts_join_to_the_texts_and_agree_with_difflib() -> None:
    a = "The quick brown fox jumps over the lazy dog and runs away from the angry farmer today"
    b = "The quick red fox leaps over the lazy cat and then runs off from the farmer today again"
    found = marked(a, b)
    assert found is not None
    for text, parts in zip((a, b), found, strict=True):
        assert "".join(piece for piece, _ in parts) == text
    kept = " ".join("".join(piece for piece, own in found[0] if not own).split())
    blocks = difflib.SequenceMatcher(None, a.split(), b.split(), autojunk=False).get_matching_blocks()
    assert kept == " ".join(word for i, _, n in blocks for word in a.split()[i : i + n])


def test_unlike_texts_have_no_marks_and_long_ones_cost_little() -> None:
    assert marked("wholly other words", "nothing in common here at all") is None
    assert marked("", "text") is None
    words = [f"w{k}" for k in range(5000)]
    found = marked(" ".join(words), " ".join([*words[:2000], "new", *words[2000:]]))
    assert found is not None
    assert [text for text, own in found[1] if own] == ["new "]
    for text in HOSTILE:
        parts = marked(f"start {text} end of it", f"start {text[::-1]} end of it")
        assert parts is None or "".join(piece for piece, _ in parts[0]) == f"start {text} end of it"


# --- texts of examples -------------------------------------------------------------------------------------------


def ledger_run(folder: Path, candidates: str | None) -> Path:
    """A run whose ledger calls c0 mislabelled; its records lie in the run, or beside it and in the manifest."""
    sets = [
        CandidateSet(f"c{k}", f"Prompt {k} {HOSTILE[0]}", [
            Response(f"good {k} {HOSTILE[2]}", scores={"rm": 2.0}), Response(f"middling {k}", scores={"rm": 1.0}),
            Response(f"poor {k}", scores={"rm": 0.5}), Response("no score"),
        ]) for k in range(4)
    ]  # fmt: skip
    folder.mkdir()
    rows = [
        {"id": f"c{k}", "epoch": e, "step": k, "loss": 1.0 + k, "margin": k - 0.5, "tau": k - 0.5}
        for k in range(4) for e in (1, 2)
    ]  # fmt: skip
    write_rows(folder / "ledger.jsonl", rows)
    if candidates is None:
        records.write(folder / "candidates.jsonl", sets)
    else:
        records.write(folder.parent / candidates, sets)
        settings = {"judge": "rm"}
        manifest.write(folder, "train", settings, [folder.parent / candidates], [folder / "ledger.jsonl"])
    return folder


@pytest.mark.parametrize("candidates", [None, "data.jsonl"])
def test_texts_of_examples_come_from_the_run_or_from_what_it_read(candidates: str | None, tmp_path: Path) -> None:
    run = read_run(ledger_run(tmp_path / "run", candidates))
    found, missing = texts_of(run, ["c2", "c0"])
    assert missing == ""
    assert found["c0"].best == f"good 0 {HOSTILE[2]}"
    assert (found["c0"].worst, found["c0"].score_best, found["c0"].score_worst) == ("poor 0", 2.0, 0.5)
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "1 of 4 training examples is probably labelled the wrong way round." in html
    assert "poor 0" in html
    assert "good 0 &lt;/style&gt;&lt;img" in html
    assert "<img" not in html


def test_texts_that_changed_or_are_gone_are_said(tmp_path: Path) -> None:
    folder = ledger_run(tmp_path / "run", "data.jsonl")
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "c0", "prompt": "other", "responses": []}) + "\n")
    found, missing = texts_of(read_run(folder), ["c0", "c1"])
    assert found == {}
    assert missing == "The texts of 2 of these examples are not at hand (data.jsonl is no more as it was)."


def test_several_judges_rank_as_they_trained() -> None:
    scores = {"a": {"one": 3.0, "two": 0.0}, "b": {"one": 0.0, "two": 30.0}, "c": {"one": 9.0}}
    sets = [CandidateSet("x", "q", [Response(text, scores=own) for text, own in scores.items()])]
    trained = {"stage": "train", "settings": {"judge": "one:0.1,two:0.9"}}
    found, _ = texts_of(Run("r", candidates=sets, manifests={"manifest.json": trained}), ["x"])
    assert (found["x"].best, found["x"].worst) == ("b", "a")  # c lacks a score
    assert found["x"].score_best == pytest.approx(0.8)
