"""More than two systems on one scale: Bradley-Terry strengths from pairwise results, with intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rankalign.data.records import CandidateSet, by_id
from rankalign.errors import InputError
from rankalign.evaluation import Row, by_policy, scored
from rankalign.evaluation.statistics import Array, Interval, percentile_interval
from rankalign.evaluation.tables import Table, interval
from rankalign.scorers.aggregate import PRIOR, bradley_terry

REFITS = 1_000  # a tenth of the draws of a mean: each of these is a fit
ELO_MEAN = 1_000.0
ELO = 400 / math.log(10)
"""Points of Elo's scale a unit of log-strength: 400 points ahead are odds of 10 to 1."""


@dataclass(frozen=True)
class Game:
    """One prompt on which two systems were compared; ``points`` is 1 where ``a`` won, 0 where ``b`` did, 0.5 tied."""

    prompt: str
    a: str
    b: str
    points: float


@dataclass(frozen=True)
class Standing:
    """One system's place.

    Attributes:
        system: its name.
        strength: log-strength; the mean over its group is 0.
        ci95: bootstrap interval of ``strength`` over prompts.
        group: from 0; systems of different groups were never compared, not even by way of others.
        win: prompts won.
        tie: prompts tied.
        loss: prompts lost.
    """

    system: str
    strength: float
    ci95: Interval
    group: int
    win: int
    tie: int
    loss: int

    @property
    def elo(self) -> float:
        """The strength on Elo's scale, a group's mean at :data:`ELO_MEAN`."""
        return ELO_MEAN + ELO * self.strength

    def as_dict(self) -> dict[str, Any]:
        """The entry in ``--json``."""
        bounds = [ELO_MEAN + ELO * bound for bound in self.ci95]
        return {**vars(self), "ci95": list(self.ci95), "elo": self.elo, "elo_ci95": bounds}


@dataclass
class Ladder:
    """Standings, strongest first within each group, over ``prompts`` prompts."""

    standings: list[Standing]
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"prompts": self.prompts, "standings": [standing.as_dict() for standing in self.standings]}

    def table(self) -> Table:
        """The ladder for people."""
        rows: list[list[Any]] = []
        for found in map(Standing.as_dict, self.standings):
            bounds = [round(bound) for bound in found["elo_ci95"]]
            rows.append(
                [found["system"], round(found["elo"]), interval(bounds), found["win"], found["tie"], found["loss"]]
            )
        note = (
            f"n = {self.prompts} prompts; mean 1000, 400 points are odds of 10 to 1; intervals bootstrapped by prompt"
        )
        if groups := max((standing.group for standing in self.standings), default=0):
            for row, standing in zip(rows, self.standings, strict=True):
                row[0] = f"{row[0]} (group {standing.group + 1})"
            note += (
                f"; the {groups + 1} groups share no comparison, so numbers of different groups say nothing together"
            )
        return Table("Bradley-Terry strengths", ["system", "Elo", "95 % interval", "win", "tie", "loss"], rows, note)


# --- games -------------------------------------------------------------------------------------------------------


def games_of_rows(rows: Iterable[Row]) -> list[Game]:
    """Games from rows of :func:`rankalign.evaluation.pairwise.orders.compare_reviews`: a prompt's two orders as one."""
    return [Game(row["id"], row["a"], row["b"], _points(row["points_a"], row["points_b"])) for row in rows]


def games_of_records(sets: Sequence[CandidateSet], judge: str) -> list[Game]:
    """Games between all policies that answered a prompt, by the mean of ``judge``'s scores of each."""
    means: dict[str, dict[str, float]] = {}
    for policy, own in by_policy(by_id(sets).values()).items():
        for record in own:
            if scores := scored(record, judge):
                means.setdefault(record.id, {})[policy] = math.fsum(scores) / len(scores)
    return [
        Game(prompt, a, b, _points(known[a], known[b]))
        for prompt, known in means.items()
        for a, b in combinations(known, 2)
    ]


def _points(a: float, b: float) -> float:
    return (1 + (a > b) - (a < b)) / 2


# --- fit ---------------------------------------------------------------------------------------------------------


def rank_systems(games: Sequence[Game], prior: float = PRIOR, draws: int = REFITS, seed: int = 0) -> Ladder:
    """Strengths by :func:`rankalign.scorers.aggregate.bradley_terry`, a group's mean set to 0.

    The groups are the connected components of who was compared with whom. The interval refits the model on prompts
    drawn with replacement, all games of a prompt together.

    Args:
        games: results; a prompt may have many.
        prior: virtual wins and losses of each system, which keep the undefeated finite.
        draws: number of refits.
        seed: seed of the generator.

    Raises:
        InputError: there is no game.
    """
    if not games:
        raise InputError("no two systems were compared, so there is nothing to rank")
    names = list(dict.fromkeys(name for game in games for name in (game.a, game.b)))
    tables = _tables(games, names)
    group = _groups(tables.sum(axis=0))
    fitted = bradley_terry(tables.sum(axis=0), prior).values
    strengths = _centred(fitted, group)
    counts = np.random.default_rng(seed).multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=draws)
    drawn = (np.tensordot(row, tables, axes=1) for row in counts.astype(np.float64))
    # From the fit to all prompts, which is near.
    refits = np.array([_centred(bradley_terry(table, prior, fitted).values, group) for table in drawn])
    order = sorted(range(len(names)), key=lambda i: (group[i], -strengths[i]))
    standings = [
        Standing(
            names[i], float(strengths[i]), percentile_interval(refits[:, i]), int(group[i]), *_record(games, names[i])
        )
        for i in order
    ]
    return Ladder(standings, len(tables))


def _tables(games: Sequence[Game], names: Sequence[str]) -> Array:
    """(P, N, N) points of the row's system against the column's, by prompt."""
    prompts = {prompt: k for k, prompt in enumerate(dict.fromkeys(game.prompt for game in games))}
    index = {name: k for k, name in enumerate(names)}
    tables = np.zeros((len(prompts), len(names), len(names)))
    for game in games:
        k, a, b = prompts[game.prompt], index[game.a], index[game.b]
        tables[k, a, b] += game.points
        tables[k, b, a] += 1 - game.points
    return tables


def _groups(table: Array) -> list[int]:
    """The connected component of each system, numbered by its first member."""
    group = [-1] * len(table)
    for start in range(len(table)):
        if group[start] >= 0:
            continue
        number, todo = max(group) + 1, [start]
        while todo:
            here = todo.pop()
            group[here] = number
            met = np.flatnonzero(table[here] + table[:, here])
            todo += [int(other) for other in met if group[other] < 0]
    return group


def _centred(strengths: Sequence[float], group: Sequence[int]) -> Array:
    values = np.array(strengths)
    for number in set(group):
        own = np.array(group) == number
        values[own] -= values[own].mean()
    return values


def _record(games: Sequence[Game], name: str) -> tuple[int, int, int]:
    points = [game.points if game.a == name else 1 - game.points for game in games if name in (game.a, game.b)]
    return points.count(1.0), points.count(0.5), points.count(0.0)
