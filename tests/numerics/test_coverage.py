"""Do the intervals cover as often as they say? Simulated judges with prompt effects, order effects and noise."""

from __future__ import annotations

import numpy as np
import pytest

from rankalign.data.shares import clustered_wilson
from rankalign.evaluation.pairwise.orders import compare_reviews
from rankalign.evaluation.pairwise.reviews import Review
from rankalign.evaluation.statistics import mean_interval

QUESTIONS, RUNS, DRAWS, LEVEL = 80, 4000, 1000, 0.90
QUALITY, ORDER = 0.3, 0.5  # true difference of the systems, and the points that standing first is worth


def lead(rng: np.random.Generator) -> np.ndarray:
    """(questions, orders) a's score minus b's: what both orders of a question share, the order's worth, and noise."""
    shared = rng.normal(scale=1.2, size=(QUESTIONS, 1))
    return QUALITY + shared + ORDER * np.array([1, -1]) + rng.normal(scale=0.6, size=(QUESTIONS, 2))


@pytest.mark.slow
def test_the_90_percent_interval_covers_88_to_92_percent() -> None:
    rng = np.random.default_rng(0)
    clustered = by_review = 0
    for run in range(RUNS):
        leads = lead(rng)
        low, high = mean_interval(leads.mean(axis=1), LEVEL, DRAWS, seed=run).interval
        clustered += low <= QUALITY <= high
        low, high = mean_interval(leads.ravel(), LEVEL, DRAWS, seed=run).interval
        by_review += low <= QUALITY <= high
    # The standard error of a coverage of 0.9 over 4,000 runs is half a point.
    assert 0.88 < clustered / RUNS < 0.92
    # Taking the two reviews of a question for independent would promise too much: the reason for clusters.
    assert by_review / RUNS < 0.86


def test_the_order_effect_is_found_and_cancels() -> None:
    rng = np.random.default_rng(1)
    leads = np.concatenate([lead(rng) for _ in range(10)])
    reviews = []
    for question, (straight, swapped) in enumerate(leads.tolist()):
        reviews.append(Review(str(question), "a", "b", "", (5 + straight, 5.0), graded=True))
        reviews.append(Review(str(question), "b", "a", "", (5.0, 5 + swapped), graded=True))
    comparison = compare_reviews(reviews)
    (system,) = comparison.systems
    low, high = comparison.extra["position"]["effect_ci95"]
    assert low < ORDER < high
    assert high - low < 0.1
    assert system.difference == pytest.approx(leads.mean())
    assert system.ci95.low < QUALITY < system.ci95.high


def test_the_interval_of_first_wins_keeps_a_question_together() -> None:
    """Ten reviews a question that nearly all say the same: a rate over 40 questions, not over 400 reviews."""
    rng, covered, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        leaning = rng.beta(0.2, 0.2, size=40)  # mean one half
        right = rng.binomial(10, leaning).astype(float)
        low, high = clustered_wilson(right.tolist(), [10.0] * 40) or (0.0, 0.0)
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / runs <= 0.98  # promised are 95 %; the exact interval over reviews covers 59 %
