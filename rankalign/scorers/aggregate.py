"""Many rankings as one score a candidate, and how well raters agree.

A ranking (:data:`Ranks`) has one rank a candidate, smaller is better, equal is a tie, None where the candidate was not
ranked; one game of a tournament is a ranking of two. Scores come back one a candidate, higher is better, None for a
candidate that no ranking compares with another.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankalign.errors import InputError

Array = NDArray[np.float64]
Ranks = Sequence[float | None]

PRIOR = 0.5
KEMENY_MOST = 10  # each further candidate takes more than twice the time


class Strengths(NamedTuple):
    """Fitted log-strengths with their standard errors, both (N,)."""

    values: list[float]
    errors: list[float]


# --- counting ----------------------------------------------------------------------------------------------------


def wins(rankings: Sequence[Ranks], count: int) -> Array:
    """(N, N): entry (i, j) is how often i stands above j, a tie half for each; 0 where the two never met."""
    table = np.zeros((count, count))
    for ranks in rankings:
        for (i, a), (j, b) in itertools.permutations(enumerate(ranks), 2):
            if a is not None and b is not None:
                table[i, j] += 1.0 if a < b else 0.5 if a == b else 0.0
    return table


def borda(table: Array) -> list[float]:
    """Borda's count: how many others a candidate stands above in a ranking, ties half, mean over rankings.

    Who has not met all others gets the mean over those met, times N - 1; so a complete set of rankings has the
    classical count divided by the number of rankings.
    """
    games = table + table.T
    shares = np.divide(table, games, out=np.zeros_like(table), where=games > 0)
    met = np.maximum((games > 0).sum(axis=1), 1)
    return [float(value) for value in shares.sum(axis=1) * (len(table) - 1) / met]


def copeland(table: Array) -> list[float]:
    """Copeland's score: opponents beaten by majority less opponents lost to; a drawn or missing duel counts nothing."""
    return [float(value) for value in np.sign(table - table.T).sum(axis=1)]


def kemeny(table: Array) -> list[float]:
    """Kemeny's rule: the order that contradicts the fewest of all pairwise verdicts, found exactly.

    Dynamic programming over sets of candidates, ``O(2^N N^2)``. The score is the number of candidates below. Where
    several orders are optimal it is the mean over all of them, so candidates that the optimal orders treat alike come
    out equal, whatever their places in the list.

    Raises:
        InputError: more than :data:`KEMENY_MOST` candidates.
    """
    n = len(table)
    if n > KEMENY_MOST:
        raise InputError(f"aggregate kemeny: {n} candidates are too many (at most {KEMENY_MOST}); use copeland")
    best, full = _best_orders(table), (1 << n) - 1
    least, orders = best[full]
    scores = [0.0] * n
    for top in range(full):
        above = best[top][0] + sum(_placing(table, j, full ^ top) for j in range(n) if top >> j & 1)
        for i in range(n):
            if top >> i & 1:
                continue
            rest = full ^ top ^ 1 << i
            if _equal(above + _placing(table, i, rest) + best[rest][0], least):
                scores[i] += rest.bit_count() * best[top][1] * best[rest][1]
    return [score / orders for score in scores]


def _placing(table: Array, i: int, rest: int) -> float:
    """Verdicts contradicted by setting candidate i above those of the set ``rest`` (bit j for candidate j)."""
    return float(sum(table[j, i] for j in range(len(table)) if rest >> j & 1))


def _best_orders(table: Array) -> list[tuple[float, int]]:
    """By set of candidates: fewest verdicts among them that an order contradicts, and how many orders do as well."""
    found = [(0.0, 1)]
    for members in range(1, 1 << len(table)):
        firsts = [i for i in range(len(table)) if members >> i & 1]
        rests = [found[members ^ 1 << i] for i in firsts]
        costs = [_placing(table, i, members) + rest[0] for i, rest in zip(firsts, rests, strict=True)]
        ways = sum(rest[1] for cost, rest in zip(costs, rests, strict=True) if _equal(cost, min(costs)))
        found.append((min(costs), ways))
    return found


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


# --- fitted strengths --------------------------------------------------------------------------------------------


def bradley_terry(table: Array, prior: float = PRIOR, start: Sequence[float] | None = None) -> Strengths:
    """Log-strengths of Bradley and Terry (1952): ``P(i beats j) = 1 / (1 + exp(s_j - s_i))``.

    The maximum of the likelihood times a prior: everybody also has ``prior`` wins and ``prior`` losses against one
    opponent of strength 0. So the undefeated and the winless stay finite, groups that never met each other are
    comparable, and 0 is the middle. A tie is half a win for each.

    Args:
        table: (N, N) from :func:`wins`.
        prior: virtual wins and losses of each candidate, above 0.
        start: (N,) where the search begins, which saves time if it is near; the maximum is the same.
    """
    pairs = [(i, j) for i, j in itertools.combinations(range(len(table)), 2) if table[i, j] + table[j, i] > 0]
    chosen = np.zeros((len(pairs), len(table)))
    present = np.zeros_like(chosen)
    for row, (i, j) in enumerate(pairs):
        chosen[row, i], chosen[row, j] = table[i, j], table[j, i]
        present[row, [i, j]] = 1
    return _fit(chosen, present, prior, start)


def plackett_luce(rankings: Sequence[Ranks], count: int, prior: float = PRIOR) -> Strengths:
    """Log-strengths of Plackett (1975) and Luce (1959): each place goes to one of those left over, ``P ~ exp(s)``.

    Tied candidates are each chosen from all of those not ranked above them (Breslow's 1974 rule for the same
    likelihood). The prior is that of :func:`bradley_terry`, with which this agrees on games without ties.
    """
    chosen, present = [], []
    for ranks in rankings:
        known = sorted({rank for rank in ranks if rank is not None})
        for rank in known:
            left = [float(other is not None and other >= rank) for other in ranks]
            if sum(left) > 1:
                chosen.append([float(other == rank) for other in ranks])
                present.append(left)
    return _fit(np.array(chosen).reshape(-1, count), np.array(present).reshape(-1, count), prior)


def _fit(chosen: Array, present: Array, prior: float, start: Sequence[float] | None = None) -> Strengths:
    """The maximum of a strictly concave sum of choices, by scipy's trust-region Newton method.

    Args:
        chosen: (K, N) how often each was chosen in choice k.
        present: (K, N) 1 for those it was chosen from.
        prior: see :func:`bradley_terry`.
        start: see :func:`bradley_terry`.
    """
    from scipy.optimize import minimize

    def down(values: Array) -> tuple[float, Array]:
        height, slope, _ = _posterior(values, chosen, present, prior)
        return -height, -slope

    def curvature(values: Array) -> Array:
        return _posterior(values, chosen, present, prior)[2]

    begin = np.zeros(present.shape[1]) if start is None else np.array(start, dtype=np.float64)
    values = minimize(down, begin, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-8}).x
    # A last step of Newton's: near the top the height is flat to rounding, and the method stops by height.
    values = values + np.linalg.solve(curvature(values), -down(values)[1])
    errors = np.sqrt(np.diag(np.linalg.inv(curvature(values))))
    return Strengths([float(v) for v in values], [float(e) for e in errors])


def _posterior(values: Array, chosen: Array, present: Array, prior: float) -> tuple[float, Array, Array]:
    """Log-posterior, its gradient (N,) and minus its Hessian (N, N)."""
    top = values.max(initial=0.0)
    weights = present * np.exp(values - top)  # less the top, or large strengths overflow
    sums, times = weights.sum(axis=1), chosen.sum(axis=1)
    shares = weights / sums[:, None]
    virtual = 1 / (1 + np.exp(-values))
    height = (chosen * values).sum() - (times * (np.log(sums) + top)).sum()
    height += prior * (values - 2 * np.logaddexp(0, values)).sum()
    slope = chosen.sum(axis=0) - times @ shares + prior * (1 - 2 * virtual)
    curvature = np.diag(times @ shares + 2 * prior * virtual * (1 - virtual)) - (times[:, None] * shares).T @ shares
    return float(height), slope, curvature


# --- by name -----------------------------------------------------------------------------------------------------

Rule = Callable[[Sequence[Ranks], int], list[float]]
RULES: dict[str, Rule] = {
    "borda": lambda rankings, count: borda(wins(rankings, count)),
    "copeland": lambda rankings, count: copeland(wins(rankings, count)),
    "bradley-terry": lambda rankings, count: bradley_terry(wins(rankings, count)).values,
    "plackett-luce": lambda rankings, count: plackett_luce(rankings, count).values,
    "kemeny": lambda rankings, count: kemeny(wins(rankings, count)),
}


def aggregate(rankings: Sequence[Ranks], count: int, rule: str) -> list[float | None]:
    """Scores of ``count`` candidates by one of :data:`RULES`; None for those that were never compared."""
    met = wins(rankings, count)
    compared = [i for i in range(count) if (met[i] + met[:, i]).any()]
    known = RULES[rule]([[ranks[i] for i in compared] for ranks in rankings], len(compared)) if compared else []
    scores: list[float | None] = [None] * count
    for i, score in zip(compared, known, strict=True):
        scores[i] = score
    return scores


# --- agreement ---------------------------------------------------------------------------------------------------


def cycles(table: Array) -> int:
    """How many triples of candidates beat one another in a ring by majority, as no order can."""
    beats = table > table.T
    rings = [(i, j, k) for i, j, k in itertools.combinations(range(len(table)), 3)]
    return sum(
        bool((beats[i, j] and beats[j, k] and beats[k, i]) or (beats[j, i] and beats[k, j] and beats[i, k]))
        for i, j, k in rings
    )


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b (1945) of two score lists; None where one of them is all ties."""
    from scipy.stats import kendalltau

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    # The p-value is not used: the exact one would cost time, and the asymptotic one of two items divides by zero.
    return float(kendalltau(a, b, method="asymptotic" if len(a) > 2 else "exact").statistic)


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960): agreement of two raters' classes beyond chance; None where chance alone explains all."""
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True))
    left, right = Counter(a), Counter(b)
    chance = sum(left[name] * right[name] for name in left) / n if n else 0.0
    return (observed - chance) / (n - chance) if n != chance else None


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]], interval: bool = False) -> float | None:
    """Krippendorff's alpha (2004): 1 less observed over expected disagreement, any number of raters, gaps allowed.

    Args:
        ratings: one list a unit with one rating a rater, None where a rater gave none. Units with fewer than two
            ratings say nothing and are left out.
        interval: disagreement is the squared difference; else (nominal) 1 for unequal ratings.

    Returns:
        None where no two ratings differ.
    """

    def differ(x: float, y: float) -> float:
        return (x - y) ** 2 if interval else float(x != y)

    units = [known for unit in ratings if len(known := [rating for rating in unit if rating is not None]) > 1]
    pooled = Counter(rating for unit in units for rating in unit)
    n = sum(pooled.values())
    observed = sum(2 * differ(x, y) / (len(unit) - 1) for unit in units for x, y in itertools.combinations(unit, 2))
    expected = sum(2 * p * q * differ(x, y) for (x, p), (y, q) in itertools.combinations(pooled.items(), 2))
    return 1 - (n - 1) * observed / expected if expected else None
