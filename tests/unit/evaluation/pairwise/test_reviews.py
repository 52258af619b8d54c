"""Reviews that exist already: parsers, sums, order effects, AlpacaEval's win rates, equal length."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from rankalign.data.formats.alpaca_eval import win_probability
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.pairwise import alpaca_eval as ae
from rankalign.evaluation.pairwise import equal_length as el
from rankalign.evaluation.pairwise.orders import compare_reviews
from rankalign.evaluation.pairwise.reviews import Review, first_line, parse_class, parse_tolerant, read_reviews
from rankalign.evaluation.pairwise.scores import Comparison
from rankalign.evaluation.pairwise.stored import recompute


@pytest.mark.parametrize(
    ("text", "strict", "tolerant"),
    [
        ("8 9\nBoth are fine.", (8, 9), (8, 9)),
        ("8.5, 9\nfine", (8.5, 9), (8.5, 9)),
        ("8", None, None),
        ("8 9 7\nthree", None, None),
        ("nan 8\nno number", None, None),
        ("8 9 are the scores", None, None),
        (
            "Let (2, -2) and (10, 4) be points.\nScores:\nAssistant 1: 10\nAssistant 2: 4\n\nAssistant 1 is better.",
            None,
            (10, 4),
        ),
        ("I say Assistant 1: 3, Assistant 2: 9. No, in the end:\n\n(7, 6)", None, (7, 6)),
        ("Assistant 1: **8**\nAssistant 2: **9**", None, (8, 9)),
        ("**Assistant 1**: 8/10\n**Assistant 2**: 7.5/10", None, (8, 7.5)),
        ("Assistant 1: 1 (Incorrect, 3 errors)\nAssistant 2: 8 (Detailed)", None, (1, 8)),
        ("I give Assistant 1 a score of 10 and Assistant 2 a score of 1.", None, (10, 1)),
        ("I will give both Assistant 1 and Assistant 2 a score of 9.", None, (9, 9)),
        ("Assistant 1:\n5(2)^3 - 2 = 38\nAssistant 2:\n2 * 19 = 38\nThey agree.", None, None),
        ("(0, 11) is out of the scale", None, None),
        ("1_0 9", None, None),
        ("Assistant 1 scored 8 and Assistant 2 scored 9.", None, (8, 9)),
        ("Assistant 1: 8\nAssistant 2: 9\n\n(1, 2)", None, None),
        ("Assistant 1: 8\nAssistant 2: 9\n\n(8, 9)", None, (8, 9)),
        ("Assistant 1: 10 minutes is too long. Assistant 2: 5 steps are missing.\n\nSo 8 and 6.", None, None),
        ("Assistant 1: 8 points. Assistant 2: 5 out of 10", None, (8, 5)),
        ("<think>Assistant 1: 2, Assistant 2: 3</think>\nAssistant 1: 8\nAssistant 2: 9", None, (8, 9)),
        ("<think>Assistant 1: 2, Assistant 2: 3</think>\nI cannot say.", None, None),
        ("<think>Assistant 1: 2, Assistant 2: 3, but", None, None),
        ("", None, None),
    ],
)
def test_two_score_parsers(text: str, strict: tuple | None, tolerant: tuple | None) -> None:
    assert first_line(text) == strict
    assert parse_tolerant(text) == tolerant


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("because\n\n1", (1, 0)),
        ("so **2**", None),
        ("so\n**2**\n", (0, 1)),
        ("x\n3.", (0.5, 0.5)),
        ("4", None),
        ("", None),
    ],
)
def test_class_parser(text: str, wanted: tuple | None) -> None:
    assert parse_class(text) == wanted


def graded(question: str, first: str, second: str, scores: tuple[float, float] | None) -> Review:
    return Review(question, first, second, "" if scores is None else f"{scores[0]} {scores[1]}\n", scores, graded=True)


def verdict(question: str, first: str, second: str, wins: str) -> Review:
    points = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}[wins]
    return Review(question, first, second, "", points, graded=False)


def test_sums_of_one_order() -> None:
    reviews = [graded("1", "x", "y", (8, 9)), graded("2", "x", "y", (7, 7)), graded("3", "x", "y", None)]
    out = compare_reviews(reviews).as_dict()
    (system,) = out["systems"]
    assert [system[key] for key in ("a", "b", "sum_a", "sum_b", "n", "unparsed", "win", "tie", "loss")] == [
        "x", "y", 15, 16, 2, 1, 0, 1, 1,
    ]  # fmt: skip
    assert system["percent"] == pytest.approx(100 * 15 / 16)
    assert system["bounds"] == pytest.approx([0.5 / 3, 1.5 / 3])
    assert (out["order_consistency"], out["position"], len(out["remarks"])) == (None, None, 1)
    assert out["parse_rate"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(out, allow_nan=False)) == out


def test_both_orders_are_averaged_and_their_agreement_counted() -> None:
    reviews = [
        graded("1", "x", "y", (8, 6)), graded("1", "y", "x", (7, 9)),  # x wins twice
        graded("2", "x", "y", (8, 7)), graded("2", "y", "x", (9, 6)),  # the first wins twice
        graded("3", "x", "y", (5, 5)), graded("3", "y", "x", None),  # half a question
    ]  # fmt: skip
    comparison = compare_reviews(reviews, "strict")
    (system,) = comparison.systems
    assert (system.sum_a, system.sum_b, system.n, system.unparsed) == (8.5 + 7, 6.5 + 8, 2, 1)
    assert (system.win, system.loss) == (1, 1)
    assert comparison.order_consistency == 0.5
    # Leads of the first answer: question 1: 2 and -2; question 2: 1 and 3.
    assert comparison.extra["position"]["effect"] == pytest.approx((0 + 2) / 2)
    assert comparison.extra["position"]["first_wins"] == 3 / 4
    assert system.extra["percent"] == pytest.approx(100 * (21 / 18 + 15 / 16) / 2)


def test_a_judge_that_always_says_a() -> None:
    reviews = [verdict(str(i), *names, "first") for i in range(40) for names in (("x", "y"), ("y", "x"))]
    comparison = compare_reviews(reviews)
    (system,) = comparison.systems
    assert (system.win_rate, system.win, system.tie, system.loss) == (0.5, 0, 40, 0)
    assert comparison.order_consistency == 0.0
    assert comparison.extra["position"]["first_wins"] == 1.0
    assert comparison.extra["position"]["effect"] == 1.0


def test_win_then_tie_of_verdicts_is_a_tie() -> None:
    reviews = [verdict("1", "x", "y", "first"), verdict("1", "y", "x", "tie"), verdict("2", "x", "y", "first"),
               verdict("2", "y", "x", "second")]  # fmt: skip
    (system,) = compare_reviews(reviews).systems
    assert (system.win, system.tie, system.loss, system.sum_a) == (1, 1, 0, 1.5)


def test_baseline_stands_second() -> None:
    reviews = [graded("1", "b", "x", (2, 1)), graded("1", "y", "b", (1, 3)), graded("1", "b", "z", (4, 1))]
    assert [(s.a, s.b, s.sum_a, s.sum_b) for s in compare_reviews(reviews).systems] == [
        ("x", "b", 1, 2), ("y", "b", 1, 3), ("z", "b", 1, 4),
    ]  # fmt: skip
    (system,) = compare_reviews(reviews[:1], baseline="x").systems
    assert (system.a, system.b) == ("b", "x")


def test_corrected_scores_count_and_are_listed() -> None:
    reviews = [Review("7", "x", "y", "9 8\n", (9, 5), graded=True), graded("8", "x", "y", (1, 2))]
    comparison = compare_reviews(reviews, "tolerant")
    (system,) = comparison.systems
    assert (system.sum_a, system.sum_b, system.extra["text_sum_b"]) == (10, 7, 10)
    assert comparison.extra["disagreements"] == [
        {"question": "7", "first": "x", "second": "y", "stored": [9, 5], "text": [9, 8]}
    ]
    assert compare_reviews(reviews, "strict").systems[0].sum_b == 10


def test_sums_by_category() -> None:
    reviews = [graded("1", "x", "y", (8, 9)), graded("2", "x", "y", (7, 6)), graded("3", "x", "y", (5, 5))]
    (system,) = compare_reviews(reviews, categories={"1": "math", "2": "math"}).systems
    assert system.extra["categories"] == {
        "math": {"n": 2, "sum_a": 15, "sum_b": 15, "win": 1, "tie": 0, "loss": 1},
        "other": {"n": 1, "sum_a": 5, "sum_b": 5, "win": 0, "tie": 1, "loss": 0},
    }


def test_bad_requests() -> None:
    with pytest.raises(InputError, match="no reviews"):
        compare_reviews([])
    with pytest.raises(InputError, match=r"unknown parser 'strickt' \(did you mean 'strict'"):
        compare_reviews([graded("1", "x", "y", (1, 2))], "strickt")
    with pytest.raises(InputError, match="no prompt has a score for both 'x' and 'y'"):
        compare_reviews([graded("1", "x", "y", None)])


def rows_file(tmp_path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_shapes_of_review_files(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [
        {"question_id": 1, "model_1": "x", "model_2": "y", "text": "8 9\n", "score": [8, 9]},
        {"question_id": 2, "answer1_id": "p", "answer2_id": "q", "text": "?", "score": [-1, -1]},
        {"question_id": 3, "model_1": "x", "model_2": "y", "text": "\n3", "score": 3},
        {"question_id": 4, "model_1": "x", "model_2": "y", "text": "?", "score": -1},
        {"winner": "ppo", "sft": "text", "ppo": "text"},
    ])  # fmt: skip
    assert read_reviews(path) == [
        Review("1", "x", "y", "8 9\n", (8, 9), graded=True),
        Review("2", "p", "q", "?", None, graded=True),
        Review("3", "x", "y", "\n3", (0.5, 0.5), graded=False),
        Review("4", "x", "y", "?", None, graded=False),
        Review("line 5", "sft", "ppo", "", (0, 1), graded=False),
    ]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question_id": 1, "model_1": "x", "text": ""}, "answer2_id"),
        ({"model_1": "x", "model_2": "y", "text": "1 2"}, "question_id"),
        ({"question_id": 1, "model_1": "x", "model_2": "y", "text": 3}, "text"),
        ({"question_id": 1, "model_1": "x", "model_2": "y", "score": [1, 2, 3]}, "score"),
        ({"question_id": 1, "model_1": "x", "model_2": "y", "score": "8 9"}, "score"),
        ({"winner": "z", "x": "", "y": ""}, "winner"),
    ],
)
def test_bad_reviews_name_line_and_field(row: dict[str, Any], field: str, tmp_path: Path) -> None:
    good = {"winner": "x", "x": "", "y": ""}
    path = rows_file(tmp_path, [good, row])
    with pytest.raises(RecordError) as caught:
        read_reviews(path)
    assert (caught.value.line, caught.value.field) == (2, field)
    errors: list[RecordError] = []
    assert len(read_reviews(path, errors.append)) == len(errors) == 1


# --- published figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parser", "sums", "unparsed"),
    [
        ("tolerant", [(513, 694), (583, 704), (664, 655.5), (693, 638)], 0),
        ("stored", [(513, 694), (583, 704), (664, 655.5), (693, 638)], 0),
        ("strict", [(501, 683), (580, 688), (634, 648.5), (663, 627)], 3),
    ],
)
def test_vicuna_sums_as_published(parser: str, sums: list[tuple[float, float]], unparsed: int, data_kit: Path) -> None:
    comparison = compare_reviews(read_reviews(data_kit / "vicuna" / "reviews.jsonl"), parser)
    assert [(s.sum_a, s.sum_b) for s in comparison.systems] == sums
    assert [s.a for s in comparison.systems] == ["llama-13b", "alpaca-13b", "bard", "gpt35"]
    assert {s.unparsed for s in comparison.systems} == {unparsed}
    # The tolerant reading agrees with the stored scores but for two that people corrected.
    found = [(d["question"], d["first"], d["stored"], d["text"]) for d in comparison.extra["disagreements"]]
    assert found == [("70", name, [10, 2], [10, 4]) for name in ("llama-13b", "bard")]


def test_qlora_percentages_and_order_effects(data_kit: Path) -> None:
    relative = compare_reviews(read_reviews(data_kit / "vicuna" / "qlora_relative.jsonl.gz"), "stored")
    wanted = {"gpt4": 114.76, "65b-guanaco": 99.30, "vicuna-13b": 94.94, "bard": 94.77, "13b-guanaco": 90.39,
              "13b-alpaca": 70.21}  # fmt: skip
    assert {s.b for s in relative.systems} == {"gpt35"}
    # Published with each order rounded before the mean.
    assert {s.a: s.extra["percent"] for s in relative.systems} == pytest.approx(wanted, abs=0.01)
    verdicts = compare_reviews(read_reviews(data_kit / "vicuna" / "qlora_pairwise.jsonl.gz"), "tolerant")
    assert verdicts.order_consistency is not None
    assert round(100 * verdicts.order_consistency, 2) == 68.48
    assert round(100 * verdicts.extra["position"]["first_wins"], 2) == 62.62
    assert verdicts.extra["disagreements"] == []


def test_minchatgpt_counts(data_kit: Path) -> None:
    comparison = compare_reviews(read_reviews(data_kit / "minchatgpt" / "preferences.jsonl"))
    counts = {(s.a, s.b): (s.win, s.n) for s in comparison.systems}
    assert counts == {("sft", "vanilla"): (141, 152), ("ppo", "vanilla"): (147, 153), ("ppo", "sft"): (136, 153)}
    for system in comparison.systems:
        exact = stats.binomtest(system.win, system.n).proportion_ci(method="exact")
        assert system.exact_ci95 == pytest.approx((exact.low, exact.high), abs=1e-11)
    assert "one order only" in comparison.extra["remarks"][0]


@pytest.mark.parametrize("version", [1, 2])
def test_alpaca_eval_rows_as_published(version: int, data_kit: Path) -> None:
    folder = data_kit / "alpaca_eval"
    found = {
        r["model"]: r for r in ae.leaderboard(ae.read_annotations(folder / f"preferences_v{version}.jsonl.gz")).rows
    }
    published = [json.loads(line) for line in (folder / "leaderboard_published.jsonl").read_text().splitlines()]
    rows = [row for row in published if row["version"] == f"v{version}"]
    assert len(rows) == len(found) == 10
    for row in rows:
        ours = found[row["model"]]
        for key in ("win_rate", "standard_error", "discrete_win_rate"):
            assert ours[key] == pytest.approx(row[key], abs=1e-8)
        for key in ("n_wins", "n_wins_base", "n_draws"):
            assert ours[key] == row[key]
        assert ours["n"] == row["n_total"]


# --- AlpacaEval, by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preference", "win"), [(1, 0), (2, 1), (1.5, 0.5), (0, 0.5), (1.25, 0.25), (None, None)])
def test_preferences(preference: float | None, win: float | None) -> None:
    assert win_probability(preference) == win


def test_leaderboard_by_hand(tmp_path: Path) -> None:
    base = {"generator_1": "ref", "generator_2": "m", "output_1": "abcd"}
    given = enumerate(((2, 4), (1, 2), (0, 6), (None, 4)))
    rows = [{**base, "instruction": f"q{i}", "preference": p, "output_2": "x" * k} for i, (p, k) in given]
    (row,) = ae.leaderboard(ae.read_annotations(rows_file(tmp_path, rows))).rows
    assert (row["win_rate"], row["n"], row["unparsed"], row["avg_length"]) == (50, 3, 1, 4)
    assert row["standard_error"] == pytest.approx(100 * math.sqrt(0.25 / 3))
    assert (row["n_wins"], row["n_wins_base"], row["n_draws"], row["discrete_win_rate"]) == (1, 1, 1, 50)
    assert row["lc_ci95"][0] <= row["length_controlled_winrate"] <= row["lc_ci95"][1]
    table = ae.Leaderboard([row]).table()
    assert len(table.columns) == len(table.rows[0])


@pytest.mark.parametrize("bad", [{"preference": 3}, {"preference": "2"}, {}])
def test_bad_annotations(bad: dict[str, Any], tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"generator_2": "m", "instruction": "q", **bad}])
    with pytest.raises(RecordError) as caught:
        ae.read_annotations(path)
    assert (caught.value.line, caught.value.field) == (1, "preference")


def test_the_fit_is_the_maximum_of_the_penalised_likelihood() -> None:
    rng = np.random.default_rng(0)
    wins, longer = rng.random(60), rng.normal(10, 80, size=60)
    length = np.tanh(longer / longer.std())

    def loss(theta: np.ndarray) -> float:
        logits = theta[0] + theta[1] * length
        return float(np.logaddexp(0, logits).sum() - wins @ logits + 0.01 * theta[1] ** 2 / 2)

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    assert el.length_controlled(wins, longer, draws=10).value == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-6)


def test_a_judge_of_length_is_driven_to_a_half() -> None:
    values: dict[str, list[float]] = {"weighted": [], "drawn": [], "strict": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        longer = rng.normal(150, 200, size=805)  # the model is longer on three prompts of four
        chance = 1 / (1 + np.exp(-longer / 60))
        judges = {"weighted": chance, "drawn": (rng.random(805) < chance) * 1.0, "strict": (longer > 0) * 1.0}
        for name, wins in judges.items():
            assert wins.mean() > 0.65
            values[name].append(el.length_controlled(wins, longer, draws=10).value)
    assert values["weighted"] == pytest.approx([0.5] * 12, abs=0.02)
    # Verdicts of 0 and 1 leave noise: a standard error of 3 to 4 points a judge, of one point over twelve.
    assert np.mean(values["drawn"]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(values["strict"]) == pytest.approx(0.5, abs=0.02)


def test_equal_length_keeps_a_win_rate_that_length_does_not_explain() -> None:
    rng = np.random.default_rng(2)
    longer = rng.normal(150, 200, size=805)
    wins = (rng.random(805) < 0.7).astype(float)
    found = el.length_controlled(wins, longer, draws=200)
    assert found.interval.low < 0.7 < found.interval.high
    assert found.value == pytest.approx(wins.mean(), abs=0.04)


def test_the_refits_are_stable_at_the_edges() -> None:
    longer = np.array([5.0, -3.0, 8.0, 1.0])
    assert el.length_controlled(np.ones(4), longer, draws=50).interval.high <= 1
    assert el.length_controlled(np.ones(4), longer, draws=50).value > 0.99
    same = el.length_controlled(np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4), draws=50)
    assert same.value == pytest.approx(0.75, abs=1e-6)


# --- telling files apart -----------------------------------------------------------------------------------------


def test_recompute_tells_files_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    annotations = rows_file(tmp_path / "a", [{"generator_2": "m", "instruction": "q", "preference": 2}])
    assert recompute(annotations).as_dict()["leaderboard"][0]["win_rate"] == 100
    reviews = rows_file(tmp_path, [{"question_id": 1, "model_1": "x", "model_2": "y", "text": "8 9", "score": [8, 9]}])
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "math"}\n')
    out = recompute(reviews, "strict", questions=questions).as_dict()
    assert out["parser"] == "strict"
    assert out["systems"][0]["categories"]["math"]["sum_b"] == 9


def test_recompute_reports_a_broken_first_line_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{broken\n{"winner": "x", "x": "", "y": ""}\n')
    with pytest.raises(RecordError):
        recompute(path)
    errors: list[RecordError] = []
    assert isinstance(recompute(path, on_error=errors.append), Comparison)
    assert len(errors) == 1
