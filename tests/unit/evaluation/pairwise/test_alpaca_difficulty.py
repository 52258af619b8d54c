"""The difficulty of prompts in length-controlled win rates: against scipy, planted values and published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rankalign.data.formats.alpaca_eval import win_probability
from rankalign.evaluation.pairwise import alpaca_eval as ae
from rankalign.evaluation.pairwise import equal_length as el
from rankalign.storage.jsonl import read_rows

Array = NDArray[np.float64]


def sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits)))


def judged(wins: Array, longer: Array) -> list[ae.Annotation]:
    """(M, P) chances and lengths as annotations."""
    return [
        ae.Annotation(f"m{m}", f"x{k}", float(win), (1000, 1000 + int(longer[m, k])))
        for m, row in enumerate(wins)
        for k, win in enumerate(row)
    ]


def test_difficulties_are_the_maximum_of_the_joint_likelihood() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    wins, longer = rng.random((3, 12)), rng.integers(-300, 300, size=(3, 12)).astype(float)
    length = np.tanh(longer / longer.std(axis=1, keepdims=True))

    def loss(theta: Array) -> float:
        a, b, x = theta[:3], theta[3:6], theta[6:]
        logits = a[:, None] + b[:, None] * length + x
        return float((np.logaddexp(0, logits) - wins * logits).sum() + 0.01 * (b**2).sum() / 2 + (x**2).sum() / 2)

    best = optimize.minimize(loss, np.zeros(18), tol=1e-12).x[6:]
    found = el.fit_jointly(ae._judged(judged(wins, longer))).difficulty
    assert list(found) == [f"x{k}" for k in range(12)]
    assert list(found.values()) == pytest.approx(list(best - best.mean()), abs=1e-5)


def test_the_three_term_fit_is_the_maximum_of_its_likelihood() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    wins, longer, hard = rng.random(60), rng.normal(10, 80, size=60), rng.normal(size=60)
    length = np.tanh(longer / longer.std())

    def loss(theta: Array) -> float:
        logits = theta[0] + theta[1] * length + theta[2] * hard
        return float(np.logaddexp(0, logits).sum() - wins @ logits + 0.01 * (theta[1:] ** 2).sum() / 2)

    best = optimize.minimize(loss, np.zeros(3), tol=1e-12).x
    found = el.length_controlled(wins, longer, draws=10, difficulty=hard).value
    assert found == pytest.approx(float(sigmoid(best[0] + best[2] * hard).mean()), abs=1e-6)


def test_planted_difficulties_come_back() -> None:
    rng = np.random.default_rng(2)
    hard, longer = rng.normal(size=80), rng.normal(0, 200, size=(8, 80))
    wins = sigmoid(rng.normal(size=(8, 1)) + hard + 0.5 * np.tanh(longer / 200))
    found = el.fit_jointly(ae._judged(judged(wins, longer))).difficulty
    assert np.corrcoef(list(found.values()), hard)[0, 1] > 0.98


def test_the_term_counts_where_long_answers_meet_easy_prompts() -> None:
    """A model that writes longer just where all models win: without the term its length takes the blame."""
    rng = np.random.default_rng(3)
    easy = rng.normal(size=805)
    longer = 150 * easy + rng.normal(0, 60, size=805) + 150
    wins = sigmoid(0.5 + easy)  # length plays no part
    plain = el.length_controlled(wins, longer, draws=10).value
    controlled = el.length_controlled(wins, longer, draws=10, difficulty=easy).value
    assert controlled == pytest.approx(wins.mean(), abs=1e-3)
    assert abs(plain - wins.mean()) > 0.05


def test_a_judge_of_length_is_driven_to_a_half_with_the_term_too() -> None:
    rng = np.random.default_rng(4)
    longer = rng.normal(150, 200, size=(4, 400))
    rows = ae.leaderboard(judged(sigmoid(longer / 60), longer)).rows
    assert all(row["win_rate"] > 65 and row["difficulty_term"] for row in rows)
    assert [row["length_controlled_winrate"] for row in rows] == pytest.approx([50] * 4, abs=2)


def test_two_models_are_too_few() -> None:
    rng = np.random.default_rng(5)
    annotations = judged(rng.random((2, 20)), rng.normal(0, 50, size=(2, 20)))
    assert el.fit_jointly(ae._judged(annotations)) is None
    assert not any(row["difficulty_term"] for row in ae.leaderboard(annotations).rows)


def test_published_figures_are_near(data_kit: Path) -> None:
    """Ten published models on the 539 prompts whose texts are in the kit: near, not equal, and nearer with the term."""
    folder = data_kit / "alpaca_eval"
    length = {(r["prompt_id"], r["model"]): len(r["output"]) for _, r in read_rows(folder / "candidates.jsonl.gz")}
    annotations = []
    for _, row in read_rows(folder / "preferences_v1.jsonl.gz"):
        lengths = [length.get((row["prompt_id"], row[f"generator_{k}"])) for k in (1, 2)]
        if None not in lengths:
            win = win_probability(row["preference"])
            annotations.append(ae.Annotation(row["model"], str(row["prompt_id"]), win, tuple(lengths)))
    lines = (folder / "leaderboard_published.jsonl").read_text().splitlines()
    published = {
        row["model"]: row["length_controlled_winrate"] for row in map(json.loads, lines) if row["version"] == "v1"
    }
    joint = el.fit_jointly(ae._judged(annotations))
    errors: dict[str, list[float]] = {"raw": [], "plain": [], "term": []}
    for model, wanted in published.items():
        own = [a for a in annotations if a.model == model and a.win is not None]
        wins, longer = np.array([a.win for a in own]), np.array([float(a.lengths[1] - a.lengths[0]) for a in own])
        known = np.array([joint.difficulty[a.prompt] for a in own])
        given = ({}, {"difficulty": known, "usual": joint.usual})
        values = (wins.mean(), *(el.length_controlled(wins, longer, 2, **keys).value for keys in given))
        for name, value in zip(errors, values, strict=True):
            errors[name].append(abs(100 * value - wanted))
    raw, plain, term = (float(np.mean(own)) for own in errors.values())
    assert raw > 13
    assert plain < 4
    assert term < 2.6


# --- lengths that do not overlap ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("longer", "overlap"),
    [
        ([1200.0] * 200, False),
        ([-5.0] * 200, False),
        ([300.0] * 196 + [-3.0] * 4, False),
        ([300.0] * 195 + [-3.0] * 5, True),
        ([300.0] * 990 + [-3.0] * 9, False),
        ([0.0] * 30, True),
        ([4.0, -2.0, 0.0], True),
        ([4.0, 2.0, 1.0], False),
    ],
)
def test_equal_length_must_lie_within_what_was_seen(longer: list[float], overlap: bool) -> None:
    assert el.lengths_overlap(np.array(longer)) is overlap


def test_no_number_where_lengths_do_not_overlap() -> None:
    found = ae.leaderboard(judged(np.ones((1, 60)), np.full((1, 60), 1200.0)))
    (row,) = found.rows
    assert row["length_overlap"] is False
    assert "length_controlled_winrate" not in row
    assert "lengths do not overlap" in found.table().rows[0]


def test_the_batch_of_refits_ends_where_scipy_does() -> None:
    rng = np.random.default_rng(6)
    features = el._features(rng.normal(50, 100, size=90), rng.normal(size=90))
    wins, prior = rng.random(90), el._Prior(np.array([0.0, 1.5, 1.0]), np.array([0.0, 3.0, 3.0]))
    best = el._fit(wins, features, prior)
    counts = np.vstack([np.ones(90), rng.multinomial(90, np.full(90, 1 / 90))]).astype(float)
    once, again = el._refits(counts, wins, features, prior, best)
    assert once == pytest.approx(best, abs=1e-8)
    repeated = np.repeat(np.arange(90), counts[1].astype(int))
    assert again == pytest.approx(el._fit(wins[repeated], features[repeated], prior), abs=1e-8)


def test_a_judge_of_length_alone_is_at_a_half_on_real_lengths(data_kit: Path) -> None:
    """The longer answer wins, whoever wrote it: ten models whose answers are longer on 51 to 98 % of the prompts."""
    lengths: dict[str, dict[str, int]] = {}
    for _, row in read_rows(data_kit / "alpaca_eval" / "candidates.jsonl.gz"):
        lengths.setdefault(row["model"], {})[str(row["prompt_id"])] = len(row["output"])
    reference = lengths.pop("text_davinci_003")
    annotations = [
        ae.Annotation(
            model, prompt, (1 + np.sign(own[prompt] - reference[prompt])) / 2, (reference[prompt], own[prompt])
        )
        for model, own in lengths.items()
        for prompt in own.keys() & reference.keys()
    ]
    rows = ae.leaderboard(annotations).rows
    assert max(row["win_rate"] for row in rows) > 97
    assert [row["length_controlled_winrate"] for row in rows] == pytest.approx([50] * 10, abs=0.01)
