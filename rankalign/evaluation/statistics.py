"""Intervals and tests. The unit is the prompt: what answers to one prompt have in common is never counted twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankalign.data import shares

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From (B, K) sums over the prompts of B resamples, (B,) values, or (B, S) of several statistics."""

DRAWS = 10_000  # 250 of them lie beyond either end of a 95 % interval
LEVEL = 0.95
GROUPS = 20_000  # at most so many units are resampled
_CELLS = 200_000  # drawn prompts held at once; they fit the processor's cache


class Interval(NamedTuple):
    """A two-sided interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    interval: Interval


# --- bootstrap ---------------------------------------------------------------------------------------------------


def bootstrap(columns: ArrayLike, statistic: Statistic, draws: int = DRAWS, seed: int = 0) -> Array:
    """Values of a statistic on resampled prompts (Efron 1979, with the prompt as the cluster).

    Each draw takes P prompts with replacement. All statistics of interest are functions of sums over prompts (mean =
    sum / P, token-weighted mean = sum of sums / sum of tokens), so sums are all that is kept of a draw.

    Of more than :data:`GROUPS` prompts, so many groups of equal size are resampled: a million prompts take no longer.
    Prompts are dealt to groups at random, and a group is worth the sum of its prompts, so the variance of a sum is
    that of resampled prompts up to a relative error of sqrt(2 / groups), 1 % of it, or half a percent of an interval's
    width; the quantiles of ``draws`` values are three times less sure. The few prompts that fill no group are in every
    draw.

    Args:
        columns: (P, K), K numbers a prompt.
        statistic: takes (B, K) sums over the prompts of B resamples, returns (B,) or, of S statistics, (B, S).
        draws: number of resamples.
        seed: seed of numpy's PCG64 generator.

    Returns:
        (draws,) or (draws, S) values.
    """
    table = np.asarray(columns, dtype=np.float64)
    if not len(table):
        raise ValueError("nothing to resample")
    rng = np.random.default_rng(seed)
    table, always = _grouped(table, rng) if len(table) > GROUPS else (table, None)
    units = len(table)
    columns_of = [np.ascontiguousarray(column) for column in table.T]
    step = max(1, _CELLS // units)
    parts = []
    for start in range(0, draws, step):
        chosen = rng.integers(units, size=(min(step, draws - start), units))
        sums = np.column_stack([np.take(column, chosen).sum(axis=1) for column in columns_of])
        parts.append(statistic(sums if always is None else sums + always))
    return np.concatenate(parts)


def _grouped(table: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """(G, K) sums of groups of equal size, and (K,) that of the prompts left over, fewer than one group's."""
    size = -(-len(table) // GROUPS)
    order = rng.permutation(len(table))
    groups = len(table) // size
    sums = table[order[: groups * size]].reshape(groups, size, -1).sum(axis=1)
    return sums, table[order[groups * size :]].sum(axis=0)


def percentile_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Percentile interval: quantiles ``(1 - level) / 2`` and ``(1 + level) / 2``, linear between order statistics."""
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def mean_interval(values: ArrayLike, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of one number a prompt with its percentile bootstrap interval; values are (P,)."""
    numbers = np.asarray(values, dtype=np.float64)
    means = bootstrap(numbers[:, None], lambda sums: sums[:, 0] / len(numbers), draws, seed)
    return Estimate(float(numbers.mean()), percentile_interval(means, level))


def mean_intervals(
    columns: Mapping[str, ArrayLike], level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> dict[str, Estimate]:
    """:func:`mean_interval` of each column, to the same bits; columns of one length share their resamples."""
    numbers = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    found = dict[str, Estimate]()
    for count in dict.fromkeys(map(len, numbers.values())):
        alike = {name: values for name, values in numbers.items() if len(values) == count}
        means = bootstrap(np.column_stack(list(alike.values())), _sums, draws, seed) / count
        for (name, values), own in zip(alike.items(), means.T, strict=True):
            found[name] = Estimate(float(values.mean()), percentile_interval(own, level))
    return {name: found[name] for name in numbers}


def _sums(sums: Array) -> Array:
    return sums


def ratio_interval(
    above: ArrayLike, below: ArrayLike, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """``sum(above) / sum(below)`` over prompts, such as nats a token, with its percentile bootstrap interval.

    Args:
        above: (P,) numerators.
        below: (P,) denominators, not all zero.
        level: coverage asked for.
        draws: number of resamples.
        seed: seed of the generator.
    """
    columns = np.column_stack([np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)])
    values = bootstrap(columns, _ratio, draws, seed)
    above_sum, below_sum = columns.sum(axis=0)
    # A resample of prompts with nothing below the line has no ratio; it is rare, and leaving it out biases nothing
    # that a reader could see.
    return Estimate(float(above_sum / below_sum), percentile_interval(values[np.isfinite(values)], level))


def _ratio(sums: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of ``a - b`` over prompts, both measured on the same ones, with its percentile bootstrap interval."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must have one shape, got {first.shape} and {second.shape}")
    return mean_interval(first - second, level, draws, seed)


def detectable_difference(differences: ArrayLike, power: float = 0.8, level: float = LEVEL) -> float:
    """Smallest true mean difference that a two-sided z-test over so many prompts would find with chance ``power``.

    ``(z(1 - (1 - level) / 2) + z(power)) * sd / sqrt(P)`` with the standard deviation of the (P,) differences at hand;
    0 for fewer than two prompts or differences that do not vary.
    """
    values = np.asarray(differences, dtype=np.float64)
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2) + ndtri(power))
    return z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def cluster_means(groups: Sequence[Sequence[float]]) -> Array:
    """(P,) mean of each prompt's values: what the bootstrap over prompts takes. Empty groups are an error."""
    if not all(len(group) for group in groups):
        raise ValueError("a prompt without values has no mean")
    return np.array([math.fsum(group) / len(group) for group in groups])


# --- binomial ----------------------------------------------------------------------------------------------------


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """``P(X <= successes)`` for X binomial."""
    from scipy.special import betaincc

    if successes < 0 or successes >= trials:
        return float(successes >= 0)
    # To the last bits, where scipy's own `bdtr` keeps nine digits of a million trials.
    return float(betaincc(successes + 1, trials - successes, chance))


def clopper_pearson(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """The exact binomial interval (Clopper and Pearson 1934): covers at least ``level`` whatever the true rate is.

    Its ends are the rates at which the observed count, or a more extreme one, has probability ``(1 - level) / 2``.
    """
    from scipy.special import betaincinv

    # The ends are quantiles of beta distributions: to the last bit, where binomtest(...).proportion_ci stops its root
    # finding at 2e-12.
    _check(successes, trials)
    tail, failures = (1 - level) / 2, trials - successes
    low = float(betaincinv(successes, failures + 1, tail)) if successes else 0.0
    return Interval(low, float(betaincinv(successes + 1, failures, 1 - tail)) if failures else 1.0)


def wilson(successes: float, trials: int, level: float = LEVEL) -> Interval:
    """:func:`rankalign.data.shares.wilson` of a count: half successes may count, more than trials may not."""
    _check(successes, trials)
    return Interval(*shares.wilson(successes / trials, trials, level))


def _check(successes: float, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials")


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the sign test: wins and losses equally likely, ties left out; 1 where nothing is decided."""
    # Twice the smaller tail, less what both hold where they are equal; `scipy.stats` takes a second to import.
    return min(1.0, 2 * binomial_tail(min(wins, losses), wins + losses, 0.5)) if wins + losses else 1.0
