"""Suites of others: their files in, their formulas by another way, and what is missing, unknown or doubled by name."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from rankalign.cli import main
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.suites import SUITES, USES, Asked, SuiteResult, evaluate_suite
from rankalign.evaluation.suites.if_checks import CHECKS, count_sentences, variants
from rankalign.evaluation.suites.reward_bench_2 import Scored, best_of, ties_score
from rankalign.evaluation.suites.style import differences, fit, markdown_counts, normalised, style_of
from rankalign.storage.jsonl import write_rows

Rows = Sequence[dict[str, Any]]


def run(name: str, folder: Path, rows: Rows, **asked: Any) -> SuiteResult:
    write_rows(folder / "in.jsonl", rows)
    return evaluate_suite(name, Asked([str(folder / "in.jsonl")], **asked))


def file(folder: Path, name: str, rows: Rows) -> str:
    write_rows(folder / name, rows)
    return str(folder / name)


def test_every_suite_says_what_it_uses() -> None:
    assert set(SUITES) == set(USES)
    with pytest.raises(InputError, match=r"unknown suite 'rewardbench' .did you mean 'rewardbench2'"):
        evaluate_suite("rewardbench", Asked(["x"]))
    with pytest.raises(InputError, match="needs --files"):
        evaluate_suite("mt-bench", Asked([]))
    with pytest.raises(InputError, match="makes nothing of baseline"):
        evaluate_suite("mt-bench", Asked(["x"], baseline="b"))


# --- RewardBench 2 -----------------------------------------------------------------------------------------------


def published_ties(rows: Sequence[Scored]) -> float:
    """The published score written out prompt by prompt."""
    ref = {row.id[4:]: row for row in rows if row.id.startswith("ref:")}
    tied = {row.id[5:]: row for row in rows if row.id.startswith("tied:")}
    split = {row.id: (row.scores[: row.correct], row.scores[row.correct :]) for row in rows}
    above = {ident: min(right) > max(wrong) for ident, (right, wrong) in split.items()}
    total = 0.3 * sum(above[r.id] for r in tied.values()) / len(tied) + 0.3 * sum(
        above[r.id] for r in ref.values()
    ) / len(ref)
    both = [n for n in tied if n in ref]
    for n in both:
        right, wrong = split[f"tied:{n}"]
        own, other = split[f"ref:{n}"]
        spread, gap = max(right) - min(right), min(right) - max(wrong)
        smaller = min(gap, min(own) - max(other))
        total += (0.2 * (gap > spread) + 0.2 * (smaller > spread)) / len(both)
        with np.errstate(divide="ignore", invalid="ignore"):
            total += (
                0.01 * float(np.nan_to_num(np.tanh(np.float64(smaller) / np.float64(spread) - 1), nan=0.0)) / len(both)
            )
    return total


def test_the_ties_score_is_the_published_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = []
        for n in range(6):
            scores = np.round(rng.normal(size=6), 1)
            rows.append(Scored(f"tied:{n}", "Ties", (*(scores[:3] + 1.2), *scores[3:]), 3))
            rows.append(Scored(f"ref:{n}", "Ties", tuple(np.round(rng.normal(size=4), 1) + np.array([1, 0, 0, 0])), 1))
        rows.append(Scored("tied:7", "Ties", (1.0, 1.0, 0.0), 2))  # no spread
        rows.append(Scored("ref:7", "Ties", (1.0, 1.0), 1))
        rows.append(Scored("tied:8", "Ties", (1.0, 2.0, 0.0), 2))  # no reference prompt
        assert ties_score(rows) == pytest.approx(published_ties(rows), abs=1e-12)


def test_a_perfect_model_gets_one_and_a_hundredth_at_most() -> None:
    rows = [Scored("tied:1", "Ties", (5.0, 5.0, 0.0), 2), Scored("ref:1", "Ties", (5.0, 0.0), 1)]
    assert ties_score(rows) == pytest.approx(1.01)


def test_best_of_four_shares_ties() -> None:
    each = ((4, 1, 2, 3), (4, 4, 2, 3), (1, 1, 1, 1), (0, 1, 2, 3))
    assert [best_of(Scored("1", "Math", scores, 1)) for scores in each] == [1, 0.5, 0.25, 0]


def rb2(ident: str, subset: str, scores: Sequence[float], correct: int = 1) -> dict[str, Any]:
    return {"id": ident, "subset": subset, "scores": list(scores), "num_correct": correct}


RB2 = [
    rb2("1", "Math", [2, 1, 0, 0]), rb2("2", "Math", [0, 1, 0, 0]), rb2("1", "Focus", [3, 1, 0, 0]),
    rb2("tied:1", "Ties", [5, 5, 0], 2), rb2("ref:1", "Ties", [5, 0]),
]  # fmt: skip


def test_rewardbench2_from_rows_and_from_published_columns(tmp_path: Path) -> None:
    found = run("rewardbench2", tmp_path, [*RB2, RB2[0]])
    assert found.metrics == pytest.approx({"Math": 0.5, "Focus": 1.0, "Ties": 1.01, "score": (0.5 + 1 + 1.01) / 3})
    assert found.remarks == [
        "1 rows stand twice and were dropped",
        "not of the published size: Math 2 of 183, Focus 1 of 495, Ties 2 of 102",
        "subsets that are missing: Factuality, Precise IF, Safety; the score is the mean of the others",
    ]
    columns = {key: [row[key] for row in RB2] for key in RB2[0]}
    columns["scores"] = [[[score] for score in row] for row in columns["scores"]]  # as pipelines leave them
    (tmp_path / "m.json").write_text(json.dumps({**columns, "model": "m", "text": [["x"]] * 5}))
    other = evaluate_suite("rewardbench2", Asked([str(tmp_path / "m.json")]))
    assert (other.metrics, other.ci95) == (found.metrics, found.ci95)


def test_rewardbench2_names_what_its_questions_do_not_have(tmp_path: Path) -> None:
    questions = file(tmp_path, "q.jsonl", [{"id": "1", "subset": "Math"}, {"id": "9", "subset": "Math"}])
    found = run("rewardbench2", tmp_path, RB2[:2], questions=questions)
    assert found.remarks == ["1 of 2 prompts are missing: 'Math/9'", "1 prompts are not in the questions: 'Math/2'"]
    with pytest.raises(RecordError, match="'Math/1' stands twice and differs"):
        run("rewardbench2", tmp_path, [RB2[0], {**RB2[0], "scores": [1, 2, 0, 0]}])
    with pytest.raises(RecordError, match="num_correct: expected a number from 1 to 3, found 4"):
        run("rewardbench2", tmp_path, [{**RB2[0], "num_correct": 4}])
    with pytest.raises(RecordError, match="expected ref:N or tied:N"):
        run("rewardbench2", tmp_path, [rb2("3", "Ties", [1, 0])])
    with pytest.raises(InputError, match="has no scores; name who scores"):
        run(
            "rewardbench2", tmp_path, [{"id": "1", "prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Math"}]
        )


def test_rewardbench2_scores_the_data_set_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "1", "prompt": "p", "chosen": ["four"], "rejected": ["a", "b", "c c"], "subset": "Math"},
            {"id": "2", "prompt": "p", "chosen": ["x"], "rejected": ["a a", "b", "c"], "subset": "Math"}]  # fmt: skip
    path = file(tmp_path, "data.jsonl", rows)
    words = [
        "eval",
        "suite",
        "rewardbench2",
        "--files",
        path,
        "--function",
        "rankalign.scorers.builtin:words",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["Math"] == 0.0  # 1, 1, 1 and 2 words; then 1, 2, 1 and 1
    assert found["suite"] == "rewardbench2"
    assert main([*words[:-1], "--table", str(tmp_path / "t.tex")]) == 0
    assert "Math" in (tmp_path / "t.tex").read_text()
    assert main(["eval", "lexical", path, "--questions", "q"]) == 1


# --- JudgeBench --------------------------------------------------------------------------------------------------


def jb(number: int, label: str, *decisions: str | None, source: str = "mmlu-pro-law") -> dict[str, Any]:
    judgments = [None if d is None else {"decision": d, "judgment": {"response": "x"}} for d in decisions]
    return {"pair_id": f"p{number}", "source": source, "label": label, "judgments": judgments}


def test_judgebench_counts_pairs_by_the_published_rule(tmp_path: Path) -> None:
    rows = [
        jb(1, "A>B", "A>B", "B>A"),  # both right
        jb(2, "A>B", "A>B", "A>B"),  # one right, one wrong: not right
        jb(3, "B>A", "B>A", "A=B"),  # right and a tie: right
        jb(4, "B>A", None, "A>B"),  # nothing read, and right: right
        jb(5, "A>B", None, None, source="livebench-math"),
        jb(6, "A>B", "B>A", "A=B", source="livecodebench"),
    ]
    found = run("judgebench", tmp_path, [*rows, rows[0]])
    assert found.metrics == pytest.approx({
        "accuracy knowledge": 0.75, "accuracy math": 0, "accuracy coding": 0, "accuracy overall": 0.5,
        "all_right": 1 / 6, "none_right": 2 / 6, "inconsistent": 4 / 6, "unread": 2 / 6,
    })  # fmt: skip
    assert found.remarks == ["1 rows stand twice and were dropped"]
    questions = file(tmp_path, "q.jsonl", [{"pair_id": "p1"}, {"pair_id": "p7"}])
    assert run("judgebench", tmp_path, rows[:2], questions=questions).remarks == [
        "1 of 2 prompts are missing: 'p7'", "1 prompts are not in the questions: 'p2'",
    ]  # fmt: skip
    one = run("judgebench", tmp_path, [jb(1, "A>B", "A>B"), jb(2, "A>B", "A=B")])
    assert one.metrics["accuracy overall"] == 0.5
    assert "one order only" in one.remarks[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([jb(1, "A=B", "A>B")], "label: expected A>B or B>A"),
        ([jb(1, "A>B", "A>C")], r"judgments\[0\].decision: expected A>B"),
        ([jb(1, "A>B", "A>B"), jb(2, "A>B", "A>B", "B>A")], "some pairs were judged in one order"),
        ([jb(1, "A>B", "A>B"), jb(1, "A>B", "B>A")], "'p1' stands twice and differs"),
        ([jb(1, "A>B")], "judgments: needs at least 1"),
    ],
)
def test_judgebench_refuses_by_name(rows: Rows, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run("judgebench", tmp_path, rows)


def test_shares_of_both_orders_are_those_that_llmbar_published(data_kit: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (data_kit / "judge_agreement/llmbar.jsonl").open()]
    said = {"1": "A>B", "2": "B>A"}
    turned = {"1": "B>A", "2": "A>B"}  # the kit has mapped the winners of the second order back
    for line in (data_kit / "judge_agreement/llmbar_published.jsonl").open():
        published = json.loads(line)
        rows = []
        for pair in pairs:
            if pair["subset"] == published["subset"]:
                told = pair["judges"][published["judge"]]
                judgments = [{"decision": said.get(told["order_1"])}, {"decision": turned.get(told["order_2_swapped"])}]
                rows.append({"pair_id": pair["id"], "label": said[str(pair["label"])], "judgments": judgments})
        found = run("judgebench", tmp_path, rows)
        right, count = (int(number) for number in published["correct_both"].split(" = ")[0].split(" / "))
        equal = int(published["equal"].split(" / ")[0])
        assert (found.n, found.metrics["all_right"]) == (count, pytest.approx(right / count))
        assert found.metrics["inconsistent"] == pytest.approx(1 - equal / count)


# --- Arena-Hard --------------------------------------------------------------------------------------------------


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    """Newton on the arrow-shaped equations against BFGS on the plain sum over battles, heavy ones written out."""
    rng = np.random.default_rng(1)
    rows, count = 300, 3
    models, weights = rng.integers(count, size=rows), rng.choice([1.0, 3.0], size=rows)
    features = normalised(rng.normal(size=(rows, 4)), weights)
    logits = np.array([0.5, -1.0, 0.2])[models] + features @ np.array([0.8, 0.0, -0.3, 0.1])
    outcomes = np.where(rng.random(rows) < 0.1, 0.5, (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(float))
    found = fit(models, features, outcomes, weights, count)
    design = np.concatenate([np.eye(count)[models], features], axis=1).repeat(weights.astype(int), axis=0)
    won = outcomes.repeat(weights.astype(int))

    def loss(coefficients: Any) -> float:
        z = design @ coefficients
        return float(np.sum(won * np.logaddexp(0, -z) + (1 - won) * np.logaddexp(0, z)))

    best = minimize(loss, np.zeros(count + 4), method="BFGS", options={"gtol": 1e-8})
    assert np.concatenate([found.strengths, found.styles]) == pytest.approx(best.x, abs=2e-5)
    assert found.win_rates == pytest.approx(1 / (1 + np.exp(-best.x[:count])), abs=1e-5)


def test_a_model_that_won_everything_has_a_win_rate_of_one() -> None:
    models, features = np.array([0, 0, 1, 1]), np.zeros((4, 4))
    found = fit(models, features, np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4), 2)
    assert found.win_rates == pytest.approx([1.0, 0.5], abs=1e-6)


def test_styles_are_counted_and_compared_as_published() -> None:
    text = "# Title\n## Part\n\n* one\n- two\n 3. three\n**bold** and __bold__\n```\n# no title\n**no**\n```"
    counts = {
        "header_count": {"h1": 1, "h2": 1},
        "list_count": {"ordered": 1, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }
    assert [20.0, *markdown_counts(text).values()] == style_of({"token_len": 20, **counts}) == [20, 2, 3, 2]
    model, baseline = np.array([[30.0, 3, 0, 6]]), np.array([[10.0, 2, 5, 0]])
    own, other = model[:, 1:] / 30, baseline[:, 1:] / 10
    expected = [[20 / 40, *((own - other) / (own + other + 1))[0]]]
    assert differences(model, baseline) == pytest.approx(np.array(expected))
    assert differences(np.zeros((1, 4)), np.zeros((1, 4))) == pytest.approx(np.zeros((1, 4)))
    column = np.array([1.0, 2.0, 4.0])
    spread = np.array([1, 2, 4, 4, 4.0])
    assert normalised(column[:, None], np.array([1, 1, 3.0]))[:, 0] == pytest.approx(
        (column - spread.mean()) / spread.std(ddof=1)
    )


def ah(uid: int, model: str, first: str | None, second: str | None, **more: Any) -> dict[str, Any]:
    games = [None if score is None else {"score": score, "judgment": {}} for score in (first, second)]
    return {"uid": f"u{uid}", "category": "hard_prompt", "judge": "gpt-4.1", "model": model, "games": games, **more}


def answer(uid: int, model: str, length: int, bold: int) -> dict[str, Any]:
    metadata = {
        "token_len": length,
        "header_count": {"h1": 0},
        "list_count": {"ordered": 0},
        "bold_count": {"**": bold, "__": 0},
    }
    return {"uid": f"u{uid}", "model": model, "messages": [{"role": "user", "content": "q"}], "metadata": metadata}


BASE = "o3-mini-2025-01-31"


def test_arena_hard_counts_games_as_published(tmp_path: Path) -> None:
    """The baseline is A in the first game, and a clear verdict counts three times."""
    rows = [ah(1, "m", "B>>A", "A>B"), ah(2, "m", "A=B", "B>A"), ah(3, "m", "A>B", None)]
    found = run("arena-hard", tmp_path, rows)
    assert found.metrics == {"hard_prompt: m": pytest.approx((1 + 1 + 1 + 1 + 0.5 + 0) / 6)}
    assert found.remarks == ["m: 1 prompts have a game that could not be read"]
    assert found.tables[0].note.startswith(f"percent, against {BASE}")


def test_arena_hard_controls_style(tmp_path: Path) -> None:
    """Two models that the judge prefers where they are longer: at equal style their win rates differ from the raw ones
    as the likelihood says."""
    rng = np.random.default_rng(2)
    rows, answers = [], []
    for uid in range(60):
        answers.append(answer(uid, BASE, 100, 1))
        for model, factor in (("long", 2.0), ("short", 0.7)):
            length = int(100 * factor * rng.uniform(0.4, 2.0))
            answers.append(answer(uid, model, length, int(rng.integers(0, 9))))
            wins = [rng.random() < 1 / (1 + math.exp(-2.5 * (length - 100) / (length + 100))) for _ in range(2)]
            rows.append(ah(uid, model, "B>A" if wins[0] else "A>B", "A>B" if wins[1] else "B>A"))
    path = file(tmp_path, "answers.jsonl", answers)
    found = run("arena-hard", tmp_path, rows, answers=[path])
    raw, controlled = (found.metrics[f"hard_prompt: long{end}"] for end in ("", " style controlled"))
    assert raw > 0.6 > controlled
    assert abs(controlled - 0.5) < 0.15
    assert found.metrics["hard_prompt: weight of token_len"] > 0.3
    assert found.tables[0].columns == [
        "model",
        "win rate",
        "95 % interval",
        "style controlled",
        "95 % interval",
        "prompts",
    ]
    with pytest.raises(InputError, match=f"lacks 1 answers: '{BASE}/u0'"):
        run("arena-hard", tmp_path, rows, answers=[file(tmp_path, "few.jsonl", answers[1:])])


def test_arena_hard_names_gaps_and_bad_rows(tmp_path: Path) -> None:
    rows = [ah(1, "m", "A>B", "A>B"), ah(2, "m", "A>B", "A>B"), ah(1, "n", "A>B", "A>B")]
    assert run("arena-hard", tmp_path, rows).remarks == ["n, hard_prompt: 1 of 2 prompts are missing: 'u2'"]
    questions = file(tmp_path, "q.jsonl", [{"uid": "u1", "category": "hard_prompt"}])
    assert run("arena-hard", tmp_path, rows, questions=questions).remarks == [
        "m, hard_prompt: 1 prompts are not in the questions: 'u2'"
    ]
    for bad, said in (
        (ah(1, "m", "A<>B", "A>B"), r"games\[0\].score: expected one of"),
        (ah(1, "m", "A>B", "A>B", category="songs"), "'songs' has no published baseline"),
        (ah(2, "m", "A>B", "A=B"), "stands twice and differs"),
    ):
        with pytest.raises(InputError, match=said):
            run("arena-hard", tmp_path, [rows[1], bad])


# --- AlpacaEval --------------------------------------------------------------------------------------------------


def test_alpaca_eval_gives_the_published_win_rates(data_kit: Path) -> None:
    found = evaluate_suite("alpaca-eval", Asked([str(data_kit / "alpaca_eval/preferences_v2.jsonl.gz")]))
    published = [json.loads(line) for line in (data_kit / "alpaca_eval/leaderboard_published.jsonl").open()]
    rows = {row["model"]: row for row in published if row["version"] in (2, "2", "v2")}
    assert len(rows) >= 5
    for model, row in rows.items():
        assert 100 * found.metrics[f"win_rate {model}"] == pytest.approx(row["win_rate"], abs=1e-9)


# --- MT-Bench ----------------------------------------------------------------------------------------------------


def mt(question: int, model: str, turn: int, score: float) -> dict[str, Any]:
    return {"question_id": question, "model": model, "judge": ["gpt-4", "single-v1"], "turn": turn, "score": score}


def test_mt_bench_means_by_turn(tmp_path: Path) -> None:
    rows = [mt(81, "m", 1, 9), mt(81, "m", 2, 6), mt(82, "m", 1, 4), mt(82, "m", 2, -1), mt(81, "n", 1, 5)]
    questions = file(tmp_path, "q.jsonl", [{"question_id": q, "category": c, "turns": ["a", "b"]}
                                           for q, c in ((81, "writing"), (82, "math"))])  # fmt: skip
    found = run("mt-bench", tmp_path, rows, questions=questions)
    assert found.metrics["score m"] == pytest.approx((9 + 6 + 4) / 3)
    assert (found.metrics["turn 1 m"], found.metrics["turn 2 m"]) == (6.5, 6.0)
    assert found.tables[0].rows[0][:4] == ["m", 6.5, 6.0, pytest.approx(19 / 3)]
    assert found.tables[0].rows[0][-1] == 1
    assert ["m", "writing", 7.5] in found.tables[1].rows
    assert found.remarks == ["n, turn 1: 1 of 2 prompts are missing: '82'"]


def test_mt_bench_pairs_by_both_orders(tmp_path: Path) -> None:
    def pair(question: int, one: str, two: str) -> dict[str, Any]:
        return {"question_id": question, "model_1": "a", "model_2": "b", "g1_winner": one, "g2_winner": two, "turn": 1}

    rows = [pair(1, "model_1", "model_1"), pair(2, "model_1", "model_2"), pair(3, "tie", "tie"),
            pair(4, "model_2", "model_2"), pair(5, "model_1", "model_1"), pair(6, "model_1", "error")]  # fmt: skip
    found = run("mt-bench", tmp_path, rows).metrics
    assert found["win_rate_adjusted a"] == pytest.approx((2 + 2 * 0.5) / 5)
    assert (found["win_rate a"], found["loss_rate a"], found["win_rate b"]) == (0.4, 0.2, 0.2)
    for bad, said in (
        ({**rows[0], "g1_winner": "a"}, "g1_winner: expected one of"),
        (mt(1, "m", 3, 5), "turn: expected 1 or 2"),
        (mt(1, "m", 1, 11), "score: expected 1 to 10"),
    ):
        with pytest.raises(RecordError, match=said):
            run("mt-bench", tmp_path, [bad])


# --- IFEval ------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": ({"keywords": ["C++", "fast"]}, ["FAST c++"], ["fast c"]),
    "keywords:frequency": ({"keyword": "ha", "frequency": 3, "relation": "at least"}, ["Hahaha"], ["haha"]),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["catalogue"], ["A Cat."]),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "less than"}, ["Z"], ["zZ"]),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"}, ["Dr. No came at 3.5 p.m. sharp. He left!"], ["Dr. No, at 3.5."]),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb"], ["a", "a***  ***b"]),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, ["it is"], ["it's so"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"}, ["a\n\n'So, it is"], ["a\n\nit is so", "so"]),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] [b]"], ["[a]"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["Bye.\nP.S. More"], ["Bye."]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["* a\n- b"], ["* a", "* a\n* b\n* c"]),
    "detectable_format:constrained_response": ({}, ["My answer is no."], ["No."]),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, ["*a* and *b*"], ["*a*", "** **"]),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, ["Section 1 a\nSection 2 b"], ["Section 1"]),
    "detectable_format:json_format": ({}, ['{"a": 1}', "```json\n[1]\n```"], ["a: 1"]),
    "detectable_format:title": ({}, ["<<A title>> x"], ["<< >>", "<A>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a\n******\na", "a"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, ["say it. Yes"], ["Yes. Say it."]),
    "startend:end_checker": ({"end_phrase": "The end."}, ['... the END."'], ["The end. Or not"]),
    "startend:quotation": ({}, ['"a"'], ['"a', '"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, ["TO-DO NOW"], ["TO-DO now"]),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_checks_by_hand(name: str) -> None:
    kwargs, right, wrong = CASES[name]
    assert [CHECKS[name](text, **kwargs) for text in right] == [True] * len(right)
    assert [CHECKS[name](text, **kwargs) for text in wrong] == [False] * len(wrong)


def test_every_check_but_those_of_languages_has_its_case() -> None:
    assert set(CHECKS) - set(CASES) == {
        "language:response_language", "change_case:english_capital", "change_case:english_lowercase"
    }  # fmt: skip
    assert CHECKS["change_case:english_capital"]("Mixed") is False
    assert CHECKS["change_case:english_lowercase"]("all of this is in small letters, and in english too") is True


def test_sentences() -> None:
    texts = ("", "One", "One. Two? Three!", "Mr. A. B. Smith went.", "Wait... what?")
    assert [count_sentences(text) for text in texts] == [0, 1, 3, 1, 2]


def test_the_loose_rule_tries_eight_answers() -> None:
    assert variants("Sure!\n*yes*\nBye") == [
        "Sure!\n*yes*\nBye", "*yes*\nBye", "Sure!\n*yes*", "*yes*",
        "Sure!\nyes\nBye", "yes\nBye", "Sure!\nyes", "yes",
    ]  # fmt: skip


def ifq(key: int, prompt: str, *instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    names, kwargs = [name for name, _ in instructions], [told for _, told in instructions]
    return {"key": key, "prompt": prompt, "instruction_id_list": names, "kwargs": kwargs}


def test_ifeval_counts_prompts_and_instructions(tmp_path: Path) -> None:
    questions = file(tmp_path, "q.jsonl", [
        ifq(1, "a", ("punctuation:no_comma", {}), ("startend:quotation", {"num_words": None})),
        ifq(2, "b", ("startend:end_checker", {"end_phrase": "Bye"})),
        ifq(3, "c", ("punctuation:no_comma", {})),
        ifq(4, "d", ("punctuation:no_comma", {})),
    ])  # fmt: skip
    answers = [{"prompt": "a", "response": '"so, so"'}, {"prompt": "b", "response": "Sure\nBye\nDone"},
               {"prompt": "c", "response": " "}, {"prompt": "x", "response": "?"}]  # fmt: skip
    found = run("ifeval", tmp_path, answers, questions=questions)
    assert found.metrics == pytest.approx({
        "prompt strict": 0, "instruction strict": 1 / 4, "prompt loose": 1 / 3, "instruction loose": 2 / 4,
    })  # fmt: skip
    assert found.n == 3
    assert found.remarks[:2] == [
        "1 of 4 prompts have no answer: 'd'", "1 answers are to no prompt of the questions: 'x'",
    ]  # fmt: skip
    assert ["punctuation:no_comma", 0.0, 0.0, 2] in found.tables[1].rows
    assert not any("langdetect" in remark for remark in found.remarks)
    with pytest.raises(RecordError, match="'a' stands twice and differs"):
        run("ifeval", tmp_path, [answers[0], {**answers[0], "response": "y"}], questions=questions)
    with pytest.raises(InputError, match="needs --questions"):
        run("ifeval", tmp_path, answers)


def test_without_a_detector_a_language_is_left_out_whatever_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves a prompt out must not depend on its answer: cases are checked, and that it is English is not."""
    monkeypatch.setitem(sys.modules, "langdetect", None)
    questions = file(tmp_path, "q.jsonl", [
        ifq(1, "a", ("language:response_language", {"language": "fr"})),
        ifq(2, "b", ("change_case:english_lowercase", {})),
        ifq(3, "c", ("change_case:english_lowercase", {})),
    ])  # fmt: skip
    answers = [{"prompt": p, "response": r} for p, r in (("a", "oui"), ("b", "yes it is"), ("c", "No"))]
    found = run("ifeval", tmp_path, answers, questions=questions)
    assert (found.n, found.metrics["prompt strict"]) == (2, 0.5)
    assert "1 prompts ask for a language" in found.remarks[0]
    assert "2 prompts ask for English in one case" in found.remarks[1]


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        (("punctuation:no_commas", {}), r"'punctuation:no_commas' is not known .did you mean"),
        (("startend:end_checker", {}), r"kwargs\[0\].end_phrase: is missing"),
        (
            ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}),
            "num_words: expected a number",
        ),
        (("length_constraints:number_words", {"num_words": 3, "relation": "about"}), "expected less than or at least"),
        (("keywords:existence", {"keywords": "a"}), "keywords: expected a list"),
    ],
)
def test_ifeval_refuses_instructions_by_name(instruction: Any, said: str, tmp_path: Path) -> None:
    questions = file(tmp_path, "q.jsonl", [ifq(1, "a", instruction)])
    with pytest.raises(RecordError, match=said):
        run("ifeval", tmp_path, [{"prompt": "a", "response": "x"}], questions=questions)
