"""Rank aggregation and agreement against brute force, closed forms and a general optimiser."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from rankalign.errors import InputError
from rankalign.scorers.aggregate import (
    RULES,
    aggregate,
    borda,
    bradley_terry,
    cohen_kappa,
    copeland,
    cycles,
    kemeny,
    kendall_tau,
    krippendorff_alpha,
    plackett_luce,
    wins,
)

Rankings = list[list[float | None]]


def random_rankings(seed: int, count: int, many: int, ties: bool = True, gaps: bool = False) -> Rankings:
    rng = random.Random(seed)
    found: Rankings = []
    for _ in range(many):
        ranks: list[float | None] = [float(rank) for rank in rng.sample(range(count), count)]
        if ties:
            ranks = [float(rng.randrange(count)) for _ in range(count)]
        found.append([None if gaps and rng.random() < 0.3 else rank for rank in ranks])
    return found


def test_wins_by_hand() -> None:
    table = wins([[1, 2, 2], [2, 1, None]], 3)
    assert table.tolist() == [[0, 1, 1], [1, 0, 0.5], [0, 0.5, 0]]


# --- counting rules ----------------------------------------------------------------------------------------------


def test_borda_of_a_published_election() -> None:
    # Tennessee's capital: 42 % Memphis, 26 % Nashville, 15 % Chattanooga, 17 % Knoxville; points 126, 194, 173, 107.
    rankings = [[1, 2, 3, 4]] * 42 + [[4, 1, 2, 3]] * 26 + [[4, 3, 1, 2]] * 15 + [[4, 3, 2, 1]] * 17
    table = wins(rankings, 4)
    assert [round(100 * score, 9) for score in borda(table)] == [126, 194, 173, 107]
    assert copeland(table) == [-3, 3, 1, -1]
    assert kemeny(table) == [0, 3, 2, 1]  # Nashville, Chattanooga, Knoxville, Memphis


def test_borda_is_the_mean_number_beaten() -> None:
    rankings = random_rankings(1, 5, 7)
    expected = [
        sum((b > a) + (b == a) / 2 for r in rankings for j, b in enumerate(r) if j != i for a in [r[i]]) / 7
        for i in range(5)
    ]
    assert borda(wins(rankings, 5)) == pytest.approx(expected, abs=1e-12)


def test_borda_of_an_incomplete_tournament_is_scaled() -> None:
    # 0 beat 1 twice, 1 drew with 2; of 2 possible opponents 0 and 2 met one.
    assert borda(wins([[1, 2, None], [1, 2, None], [None, 1, 1]], 3)) == [2, 0.5, 1]


def contradicted(order: Sequence[int], rankings: Rankings) -> float:
    """Verdicts that an order contradicts, counted from the rankings themselves."""
    cost = 0.0
    for i, j in itertools.combinations(order, 2):
        for ranks in rankings:
            a, b = ranks[i], ranks[j]
            if a is not None and b is not None:
                cost += (b < a) + (a == b) / 2
    return cost


@pytest.mark.parametrize("seed", range(8))
def test_kemeny_is_the_mean_of_all_best_orders(seed: int) -> None:
    count = 3 + seed % 4
    rankings = random_rankings(seed, count, 2 + seed % 3, gaps=seed % 2 == 1)
    costs = {order: contradicted(order, rankings) for order in itertools.permutations(range(count))}
    best = [order for order, cost in costs.items() if cost == min(costs.values())]
    below = [sum(count - 1 - order.index(i) for order in best) / len(best) for i in range(count)]
    assert kemeny(wins(rankings, count)) == pytest.approx(below, abs=1e-12)


def test_kemeny_of_eight_agrees_with_a_planted_order_and_has_a_limit() -> None:
    planted = [3, 1, 4, 0, 5, 7, 2, 6]
    assert kemeny(wins([planted], 8)) == [7 - rank for rank in planted]
    with pytest.raises(InputError, match="aggregate kemeny: 11 candidates are too many"):
        kemeny(np.zeros((11, 11)))


# --- strengths ---------------------------------------------------------------------------------------------------


def test_bradley_terry_of_two_in_closed_form() -> None:
    # By symmetry s, -s: 3 wins to 1 and a virtual win and loss of half a game each.
    strengths = bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=0.5)
    s = strengths.values[0]
    sigma = 1 / (1 + math.exp(-2 * s))
    assert 3 - 4 * sigma + 0.5 * (1 - 2 / (1 + math.exp(-s))) == pytest.approx(0, abs=1e-10)
    assert strengths.values[1] == pytest.approx(-s, abs=1e-12)
    # Without much of a prior the log-odds are those of the games, with the textbook standard error.
    bare = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=1e-6)
    assert bare.values[0] - bare.values[1] == pytest.approx(math.log(3), abs=1e-6)


def test_bradley_terry_is_what_an_optimiser_finds() -> None:
    rng = np.random.default_rng(5)
    table = rng.integers(0, 6, (5, 5)).astype(float)
    np.fill_diagonal(table, 0)

    def loss(s: np.ndarray) -> float:
        games = sum(table[i, j] * np.logaddexp(0, s[j] - s[i]) for i in range(5) for j in range(5))
        return float(games + 0.5 * (np.logaddexp(0, s) + np.logaddexp(0, -s)).sum())

    found = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9})
    fit = bradley_terry(table)
    assert fit.values == pytest.approx(found.x, abs=1e-6)
    step = 1e-4
    eye = np.eye(5) * step
    hessian = [
        [
            (loss(fit.values + a + b) - loss(fit.values + a - b) - loss(fit.values - a + b) + loss(fit.values - a - b))
            / (4 * step**2)
            for b in eye
        ]
        for a in eye
    ]
    assert fit.errors == pytest.approx(np.sqrt(np.diag(np.linalg.inv(hessian))), rel=1e-4)


@pytest.mark.parametrize("games", [1.0, 1e3, 1e6])
def test_the_undefeated_stay_finite_and_on_top(games: float) -> None:
    table = np.triu(np.full((4, 4), games), 1)
    values = bradley_terry(table).values
    assert all(map(math.isfinite, values))
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx([-value for value in values[::-1]], abs=1e-6)


def test_groups_that_never_met_are_each_centred() -> None:
    table = np.zeros((4, 4))
    table[0, 1] = table[2, 3] = 3
    values = bradley_terry(table).values
    assert values[0] == pytest.approx(values[2], abs=1e-12)
    assert values[0] == pytest.approx(-values[1], abs=1e-12)


def log_likelihood(s: np.ndarray, rankings: Rankings, prior: float) -> float:
    """Plackett-Luce with Breslow's ties, written out candidate by candidate."""
    value = -prior * float((np.logaddexp(0, s) + np.logaddexp(0, -s)).sum())
    for ranks in rankings:
        for i, own in enumerate(ranks):
            if own is not None:
                left = [s[j] for j, other in enumerate(ranks) if other is not None and other >= own]
                value += float(s[i] - np.logaddexp.reduce(left))
    return value


@pytest.mark.parametrize("seed", range(4))
def test_plackett_luce_is_what_an_optimiser_finds(seed: int) -> None:
    rankings = random_rankings(seed, 5, 6, ties=seed > 1, gaps=seed % 2 == 1)
    found = minimize(lambda s: -log_likelihood(s, rankings, 0.5), np.zeros(5), method="BFGS", options={"gtol": 1e-9})
    assert plackett_luce(rankings, 5).values == pytest.approx(found.x, abs=1e-6)


def test_plackett_luce_on_games_is_bradley_terry() -> None:
    rng = random.Random(3)
    games: Rankings = []
    for _ in range(30):
        winner, loser = rng.sample(range(4), 2)
        games.append([{winner: 1.0, loser: 2.0}.get(i) for i in range(4)])
    one, two = plackett_luce(games, 4), bradley_terry(wins(games, 4))
    assert one.values == pytest.approx(two.values, abs=1e-10)
    assert one.errors == pytest.approx(two.errors, abs=1e-10)


# --- all rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_follows_the_candidates_and_respects_unanimity(rule: str) -> None:
    rankings: Rankings = [[2, 1, 3, 4], [2, 1, 3, 4], [2, 1, 4, 3]]
    scores = aggregate(rankings, 4, rule)
    assert scores[1] > scores[0] > scores[2] > scores[3]  # type: ignore[operator]
    moved = aggregate([[ranks[i] for i in (3, 0, 2, 1)] for ranks in rankings], 4, rule)
    assert moved == pytest.approx([scores[i] for i in (3, 0, 2, 1)], abs=1e-9)
    tied = aggregate([[1, 1, 1]], 3, rule)
    assert tied == pytest.approx([tied[0]] * 3, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_who_was_never_compared_has_no_score(rule: str) -> None:
    assert aggregate([], 2, rule) == [None, None]
    assert aggregate([[1, None, None]], 3, rule) == [None] * 3
    scores = aggregate([[1, None, 2]], 3, rule)
    assert scores[1] is None
    assert scores[0] > scores[2]  # type: ignore[operator]


# --- agreement ---------------------------------------------------------------------------------------------------


def test_cycles() -> None:
    assert cycles(wins([[1, 2, 3], [2, 3, 1], [3, 1, 2]], 3)) == 1
    assert cycles(wins([[1, 2, 3]], 3)) == 0
    assert cycles(wins([[1, 2, 2]], 3)) == 0
    rock = np.zeros((5, 5))
    for i in range(5):
        rock[i, (i + 1) % 5] = rock[i, (i + 2) % 5] = 1  # the regular tournament of five has 5 of 10 triples cyclic
    assert cycles(rock) == 5


def test_kendall_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, (2, 7)).tolist()
        tau = kendall_tau(a, b)
        if tau is None:
            assert 1 in (len(set(a)), len(set(b)))
        else:
            assert tau == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
    assert kendall_tau([1, 1], [1, 2]) is None


def test_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, by chance 0.5.
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4, abs=1e-12)
    assert cohen_kappa(["y"], ["y"]) is None
    assert cohen_kappa([], []) is None


def test_krippendorff_is_the_published_value() -> None:
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: 4 observers, 12 units, gaps.
    star = None
    raters = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, star, star, star],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, star, 3],
        [star, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, star],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, star],
    ]
    units = [list(unit) for unit in zip(*raters, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, interval=True) == pytest.approx(0.849, abs=5e-4)
    assert krippendorff_alpha([[1, 1], [1, None]]) is None
