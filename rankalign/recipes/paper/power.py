"""How many prompts or seeds would decide what the intervals left open, in closed form from the paired variances.

A figure is a mean over S seeds and P prompts of paired values d(s, p) (of a ratio, its linear part). Their variance has
three components, of seeds, of prompts and of both at once (analysis of variance of a two-way layout without
replicates), and that of the mean is ``seeds / S + prompts / P + both / (S P)``. An interval of 95 % excludes the bound
where 1.96 times its root is below the distance to it. If the figure itself stays what it is, that gives the number of
either; prompts alone cannot take away what seeds disagree on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankalign.evaluation.statistics import Array

Z = 1.959963984540054  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Needed:
    """What would decide a finding.

    Attributes:
        factor: so many times the prompts, at these seeds; None where no number of prompts would.
        prompts: so many prompts that is, of each set that the figure is made of.
        seeds: so many seeds, at these prompts; None where no number of seeds would, or one seed tells nothing of it.
        both: seeds, and prompts of each set, where both become more by the same factor; None without a distance.
    """

    factor: float | None
    prompts: tuple[int, ...]
    seeds: int | None
    both: tuple[int, tuple[int, ...]] | None = None

    def __str__(self) -> str:
        """In words."""
        ways = [f"{_counts(self.prompts)} prompts at these seeds"] if self.factor is not None else []
        ways += [f"{self.seeds:,} seeds at these prompts"] if self.seeds is not None else []
        if not ways and self.both is not None:
            ways = [f"{self.both[0]:,} seeds with {_counts(self.both[1])} prompts"]
        return " or ".join(ways) or "more seeds and more prompts"


def _counts(of: tuple[int, ...]) -> str:
    return " and ".join(f"{n:,}" for n in of)


def needed(parts: Sequence[Array], distance: float) -> Needed:
    """What it takes for the interval of a mean to end before the bound.

    Args:
        parts: (S, P_i) each, over sets of prompts of their own and the same seeds; their means add up to the figure.
        distance: of the figure to its bound.
    """
    between, prompts, both = _components(parts)
    seeds, goal = len(parts[0]), (distance / Z) ** 2
    factor = seeds_needed = None
    if goal > between / seeds:
        factor = max((prompts + both / seeds) / (goal - between / seeds), 1.0)
    if seeds > 1 and goal > prompts:
        seeds_needed = max(math.ceil((between + both) / (goal - prompts)), seeds)
    counts = tuple(math.ceil(factor * part.shape[1]) for part in parts) if factor is not None else ()
    together = None
    if goal > 0:  # (between / S + prompts) / f + both / S / f^2 = goal
        linear = between / seeds + prompts
        times = max((linear + math.sqrt(linear**2 + 4 * goal * both / seeds)) / (2 * goal), 1.0)
        together = math.ceil(times * seeds), tuple(math.ceil(times * part.shape[1]) for part in parts)
    return Needed(factor, counts, seeds_needed, together)


def half_width(parts: Sequence[Array]) -> float:
    """Half of the interval of 95 % that the components give the mean; arguments as in :func:`needed`."""
    between, prompts, both = _components(parts)
    return Z * math.sqrt(prompts + (between + both) / len(parts[0]))


def _components(parts: Sequence[Array]) -> tuple[float, float, float]:
    """Variance of a seed, of the mean over prompts, and of what the two have together."""
    both = sum(_both(part) / part.shape[1] for part in parts)
    return _between(parts, both), sum(_prompts(part) / part.shape[1] for part in parts), both


def _both(part: Array) -> float:
    """Variance of what a seed and a prompt have together; 0 where one seed does not tell."""
    seeds, prompts = part.shape
    if seeds < 2 or prompts < 2:
        return 0.0
    rest = part - part.mean(1, keepdims=True) - part.mean(0, keepdims=True) + part.mean()
    return float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))


def _prompts(part: Array) -> float:
    """Variance between prompts."""
    seeds, prompts = part.shape
    return max(float(part.mean(0).var(ddof=1)) - _both(part) / seeds, 0.0) if prompts > 1 else 0.0


def _between(parts: Sequence[Array], both: float) -> float:
    """Variance between seeds of the whole figure."""
    if len(parts[0]) < 2:
        return 0.0
    return max(float(np.sum([part.mean(1) for part in parts], axis=0).var(ddof=1)) - both, 0.0)
