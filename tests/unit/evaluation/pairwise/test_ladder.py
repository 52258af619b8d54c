"""Bradley-Terry over many systems: closed forms, scipy's optimum, groups, and intervals by prompt."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.evaluation.pairwise.ladder import ELO_MEAN, Game, games_of_records, games_of_rows, rank_systems


def duel(a: str, b: str, wins: int, losses: int, start: int = 0) -> list[Game]:
    return [Game(f"q{start + k}", a, b, float(k < wins)) for k in range(wins + losses)]


def test_two_systems_have_the_log_odds_between_them() -> None:
    found = rank_systems(duel("a", "b", 30, 10), prior=1e-9, draws=10).standings
    assert [s.system for s in found] == ["a", "b"]
    assert found[0].strength - found[1].strength == pytest.approx(math.log(3), abs=1e-6)
    assert found[0].elo - found[1].elo == pytest.approx(400 * math.log10(3), abs=1e-4)
    assert found[0].elo + found[1].elo == pytest.approx(2 * ELO_MEAN)
    assert (found[0].win, found[0].tie, found[0].loss) == (30, 0, 10)


def test_400_points_are_odds_of_ten_to_one() -> None:
    found = rank_systems(duel("a", "b", 100, 10), prior=1e-9, draws=10).standings
    assert found[0].elo - found[1].elo == pytest.approx(400, abs=1e-3)


def test_a_chain_adds_its_log_odds() -> None:
    games = duel("a", "b", 20, 10) + duel("b", "c", 30, 10, start=100)  # a and c never met
    strength = {s.system: s.strength for s in rank_systems(games, prior=1e-9, draws=10).standings}
    assert strength["a"] - strength["c"] == pytest.approx(math.log(2) + math.log(3), abs=1e-6)
    assert sum(strength.values()) == pytest.approx(0, abs=1e-12)


def test_the_fit_is_the_optimum_that_scipy_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng, names = np.random.default_rng(0), ["a", "b", "c", "d"]
    pairs = [rng.choice(4, size=2, replace=False) for _ in range(120)]
    games = [Game(f"q{k % 40}", names[i], names[j], float(rng.choice([0, 0.5, 1]))) for k, (i, j) in enumerate(pairs)]
    index = {name: k for k, name in enumerate(names)}

    def loss(s: np.ndarray) -> float:
        likelihood = sum(
            g.points * (s[index[g.a]] - s[index[g.b]]) - np.logaddexp(0, s[index[g.a]] - s[index[g.b]]) for g in games
        )
        return -likelihood - 0.5 * sum(value - 2 * np.logaddexp(0, value) for value in s)

    expected = optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    found = {s.system: s.strength for s in rank_systems(games, prior=0.5, draws=10).standings}
    assert [found[name] for name in names] == pytest.approx(list(expected - expected.mean()), abs=1e-5)


def test_groups_that_never_met_stay_apart() -> None:
    games = duel("a", "b", 9, 1) + duel("x", "y", 1, 9, start=50)
    ladder = rank_systems(games, draws=20)
    assert [(s.system, s.group) for s in ladder.standings] == [("a", 0), ("b", 0), ("y", 1), ("x", 1)]
    assert ladder.standings[0].strength + ladder.standings[1].strength == pytest.approx(0, abs=1e-12)
    assert "share no comparison" in ladder.table().note
    assert [row[0] for row in ladder.table().rows][2] == "y (group 2)"


def test_prompts_are_resampled_whole() -> None:
    """Five copies of every game on its own prompt are no new evidence, five games on new prompts are."""
    same = [game for game in duel("a", "b", 24, 16) for _ in range(5)]
    copies, once = (
        rank_systems(games, prior=1e-9, draws=300).standings[0].ci95 for games in (same, duel("a", "b", 24, 16))
    )
    assert copies == pytest.approx(tuple(once), abs=1e-6)
    many = rank_systems(duel("a", "b", 120, 80), prior=1e-9, draws=300).standings[0].ci95
    assert (many.high - many.low) / (once.high - once.low) == pytest.approx(1 / math.sqrt(5), rel=0.2)


def test_the_undefeated_are_finite() -> None:
    ladder = rank_systems(duel("a", "b", 10, 0), draws=50)
    assert math.isfinite(ladder.standings[0].ci95.high)


def test_games_of_records_are_all_pairs_of_policies_by_mean_score() -> None:
    answers = [("x", 1.0), ("x", 3.0), ("y", 2.0), ("z", 5.0), ("silent", None)]
    responses = [
        Response(f"t{k}", policy, scores={"j": s} if s is not None else {}) for k, (policy, s) in enumerate(answers)
    ]
    games = games_of_records([CandidateSet("p", "q", responses)], "j")
    assert [(g.a, g.b, g.points) for g in games] == [("x", "y", 0.5), ("x", "z", 0.0), ("y", "z", 0.0)]
    with pytest.raises(InputError, match="no two systems"):
        rank_systems([])


def test_order_of_published_systems(data_kit: Path) -> None:
    """QLoRA's reviews against ChatGPT: the order of the published percentages, and all in one group."""
    from rankalign.evaluation.pairwise.stored import recompute

    found = recompute(data_kit / "vicuna" / "qlora_relative.jsonl.gz")
    ladder = rank_systems(games_of_rows(found.rows), draws=50)  # type: ignore[union-attr]
    assert {s.group for s in ladder.standings} == {0}
    assert ladder.standings[0].system.startswith("gpt4")
    assert "alpaca" in ladder.standings[-1].system
