"""Bradley-Terry with style covariates: what a system wins beyond what its length and markdown win (Li et al. 2024).

P(model beats baseline) = sigmoid(s_model - s_baseline + b . z), z the differences in style of both answers, normalised
over all battles. The published fit is the maximum of this likelihood without a penalty, battles of weight 3 standing
three times; its win rate is sigmoid(s_model - s_baseline), style left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankalign.evaluation.statistics import Array

FEATURES = ("token_len", "header_count", "list_count", "bold_count")
RIDGE = 1e-9
"""Keeps the equations solvable where a style never varies; far below what any digit shown could tell."""
STEPS = 100
_CODE = re.compile(r"```[^`]*```")
_MARKS = {
    "header_count": (r"^#{1,6}\s",),
    "list_count": (r"^\s*\d+\.\s", r"^\s*[-*+]\s"),
    "bold_count": (r"\*\*[^*\n]+\*\*", r"__[^_\n]+__"),
}


def markdown_counts(text: str) -> dict[str, float]:
    """Headings, list items and bold passages of an answer, blocks of code left out."""
    bare = _CODE.sub("", text)
    return {
        name: float(sum(len(re.findall(mark, bare, re.MULTILINE)) for mark in marks)) for name, marks in _MARKS.items()
    }


def style_of(metadata: Mapping[str, Any]) -> list[float]:
    """Length in tokens and the three counts, (4,), from an answer's published metadata."""
    found = [metadata[name] for name in FEATURES]
    return [float(sum(value.values()) if isinstance(value, Mapping) else value) for value in found]


def differences(model: Array, baseline: Array) -> Array:
    """(R, 4) differences in style from the (R, 4) styles of both answers.

    Length: (m - b) / (m + b). The others as densities, counts a token: (m - b) / (m + b + 1). An empty answer has
    density 0, and two of them no difference.
    """
    found = np.zeros_like(model)
    found[:, 0] = _ratio(model[:, 0] - baseline[:, 0], model[:, 0] + baseline[:, 0])
    own, other = (_ratio(side[:, 1:], side[:, :1]) for side in (model, baseline))
    found[:, 1:] = (own - other) / (own + other + 1)
    return found


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def normalised(features: Array, weights: Array) -> Array:
    """Columns less their mean, over their standard deviation (n - 1), rows counted ``weights`` times; 0 if constant."""
    total = weights.sum()
    centred = features - weights @ features / total
    deviation = np.sqrt(weights @ centred**2 / (total - 1)) if total > 1 else np.zeros(features.shape[1])
    return _ratio(centred, deviation[None])


@dataclass(frozen=True)
class Fit:
    """Strength of each model less the baseline's, (M,), and the weight of each style, (F,)."""

    strengths: Array
    styles: Array

    @property
    def win_rates(self) -> Array:
        """(M,) chances to beat the baseline at equal style."""
        return 1 / (1 + np.exp(-self.strengths))


def fit(models: Array, features: Array, outcomes: Array, weights: Array, count: int, start: Fit | None = None) -> Fit:
    """The maximum likelihood, by Newton's method.

    Args:
        models: (R,) which model played, 0 to ``count`` - 1.
        features: (R, F) style differences.
        outcomes: (R,) 1 where the model won, 0.5 for a tie.
        weights: (R,) how often each row counts.
        count: M, number of models.
        start: where the search begins.

    Returns:
        The fit; a model that won or lost everything has a strength of 30 in size, whose win rate is 1 or 0.
    """
    strengths = np.zeros(count) if start is None else start.strengths.copy()
    styles = np.zeros(features.shape[1]) if start is None else start.styles.copy()
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(strengths[models] + features @ styles, -60, 60)))
        pull, curve = weights * (outcomes - chance), weights * chance * (1 - chance)
        # Each row has one model, so that part of the equations is diagonal and only the styles are solved for.
        own = np.bincount(models, pull, count)
        diagonal = np.bincount(models, curve, count) + RIDGE
        cross = np.stack([np.bincount(models, curve * column, count) for column in features.T], axis=1)
        inner = features.T @ (curve[:, None] * features) + RIDGE * np.eye(features.shape[1])
        left = inner - cross.T @ (cross / diagonal[:, None])
        step_styles = np.linalg.solve(left, features.T @ pull - cross.T @ (own / diagonal))
        step_models = (own - cross @ step_styles) / diagonal
        # Far from the maximum a whole step may overshoot.
        scale = min(1.0, 4.0 / max(np.abs(step_models).max(initial=0), np.abs(step_styles).max(initial=0), 1e-30))
        strengths = np.clip(strengths + scale * step_models, -30, 30)
        styles = styles + scale * step_styles
        if max(np.abs(step_models).max(initial=0), np.abs(step_styles).max(initial=0)) < 1e-10:
            break
    return Fit(strengths, styles)
