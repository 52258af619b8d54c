"""Several judges at once: the weights that rank by all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rankalign.errors import InputError


def weighted(judge: str) -> dict[str, float]:
    """The weights of ``name:weight,name:weight``, by judge; none where it is the name of one.

    Raises:
        InputError: a part without a weight among others that have one, a weight that is 0 or no number, a judge twice.
    """
    parts = [part.strip() for part in judge.split(",")]
    if len(parts) < 2 or ":" not in judge:
        return {}
    weights: dict[str, float] = {}
    for part in parts:
        name, _, number = part.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not math.isfinite(weight) or not weight:
            raise InputError(f"--judge {judge!r}: {part!r} is not a judge, once, with a weight; write rm:0.7,vader:0.3")
        weights[name] = weight
    return weights


def combined(scores: Sequence[Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """One score a candidate, from its scores by each judge of a list, in the order of the weights.

    Judges have scales of their own, so each one's scores are first taken to mean 0 and deviation 1 over the list; one
    that calls all equal says nothing. The result is the weighted mean, with the weights' sizes adding up to 1.

    Args:
        scores: (N, J) finite.
        weights: J of them, by judge.
    """
    table = np.array(scores, dtype=float).reshape(len(scores), len(weights))
    equal = (table == table[:1]).all(axis=0)
    table = table / np.maximum(np.abs(table).max(axis=0, initial=0), 1e-300)  # the squares of large scores overflow
    table = table - table.mean(axis=0) if len(table) else table
    size = np.sqrt((table**2).mean(axis=0)) if len(table) else np.ones(len(weights))
    standard = np.where(equal, 0.0, table / np.where(equal | (size == 0), 1.0, size))
    shares = np.array(list(weights.values())) / sum(map(abs, weights.values()))
    return [float(sum(row * shares)) for row in standard]
