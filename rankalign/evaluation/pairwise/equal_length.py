"""The win rate that answers of equal length would have (Dubois et al. 2024), fitted to what is in the file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rankalign.evaluation.statistics import Array, Estimate, Interval, bootstrap, percentile_interval

FEWEST_MODELS = 3
REFITS = 1_000  # a tenth of the draws of a mean: each of these is a fit
WEAK = 0.01
"""Precision of the prior on slopes: a judge of length alone would send them to infinity."""
PRECISIONS = (WEAK, 0.3, 3.0, 30.0, 300.0)
"""Of the pull to what is usual, for cross-validation to choose from; 805 prompts alone say some 70."""
FOLDS = 5
OVERLAP, FEWEST = 0.01, 5  # share and number of prompts on which a side must be no longer than the other
DECIDES = 0.9  # share of longer answers that win, on either side
_STEPS = 50
_FARTHEST = 15.0  # logits beyond this are 0 or 1 to six digits

Judged = tuple[str, str, float, float]
"""Model, prompt, chance to win, how many characters longer than the reference."""


class Joint(NamedTuple):
    """What all models of a file say together.

    Attributes:
        difficulty: of each prompt, in logits, with mean 0; high where models win.
        usual: the medians over models of what length and difficulty weigh.
    """

    difficulty: dict[str, float]
    usual: tuple[float, float]


def lengths_overlap(longer: Array) -> bool:
    """Whether either side is at times the shorter one, so that equal length lies within what was seen.

    Asked for are prompts with ``longer <= 0`` and with ``longer >= 0``, one in a hundred of each and at least
    :data:`FEWEST` (one in ten of a smaller set).
    """
    longer = np.asarray(longer, dtype=np.float64)
    least = math.ceil(max(OVERLAP * len(longer), min(FEWEST, len(longer) / 10)))
    return bool(min((longer <= 0).sum(), (longer >= 0).sum()) >= least)


def length_controlled(
    wins: Array,
    longer: Array,
    draws: int = REFITS,
    seed: int = 0,
    difficulty: Array | None = None,
    usual: tuple[float, float] | None = None,
) -> Estimate:
    """The win rate that answers of equal length would have, after Dubois et al. 2024.

    Fitted is ``logit P(win) = a + b * tanh(longer / sd(longer)) + c * difficulty`` by maximum likelihood with soft
    targets and Gaussian priors on b and c; the estimate is the mean over prompts of ``sigmoid(a + c * difficulty)``.
    The priors are weak, or pull b and c to what is usual with other models, as strongly as 5-fold cross-validation
    finds best. The interval comes from refitting the model on resampled prompts. Where length decides, the curve jumps
    at equal length and no slope can follow it (see :func:`length_decides`): there it is the middle of both sides.

    The published figures differ in three terms, whose data are not in annotations: their difficulties come from the
    whole leaderboard; judgements of one model told to be verbose and to be concise count as further rows of weight 0.1,
    without a; and a, b and c are under an L1 penalty chosen by cross-validation.

    Args:
        wins: (P,) chances to win.
        longer: (P,) length of the answer less that of the reference's.
        draws: number of refits.
        seed: seed of the generator.
        difficulty: (P,) of each prompt, from :func:`fit_jointly`; None leaves the term out.
        usual: b and c of other models, from there; None where there are none.
    """
    wins, longer = np.asarray(wins, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    if length_decides(wins, longer):
        return _middle(wins, longer, draws, seed)
    features = _features(longer, difficulty)
    prior = _prior(wins, features, usual)
    level = features * np.array([1.0, 0.0, 1.0])[: features.shape[1]]  # all answers as long as the reference's
    best = _fit(wins, features, prior)
    counts = np.random.default_rng(seed).multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=draws)
    chances = _chance(_refits(counts.astype(np.float64), wins, features, prior, best) @ level.T)
    bounds = percentile_interval((counts * chances).sum(1) / counts.sum(1))
    interval = Interval(max(0.0, bounds.low), min(1.0, bounds.high))
    return Estimate(float(_chance(level @ best).mean()), interval)


def length_decides(wins: Array, longer: Array) -> bool:
    """Whether the longer answer wins nearly always, whichever side it is on."""
    wins, longer = np.asarray(wins, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    sides = wins[longer > 0], 1 - wins[longer < 0]
    return all(len(side) >= FEWEST and side.mean() >= DECIDES for side in sides)


def _middle(wins: Array, longer: Array, draws: int, seed: int) -> Estimate:
    """The mean of the win rates where the model is longer and where it is shorter."""
    above, below = (longer > 0).astype(np.float64), (longer < 0).astype(np.float64)
    columns = np.column_stack([wins * above, above, wins * below, below])

    def middle(sums: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3]) / 2

    values = bootstrap(columns, middle, draws, seed)
    value = float(middle(columns.sum(axis=0, keepdims=True))[0])
    return Estimate(value, percentile_interval(values[np.isfinite(values)]))


def _features(longer: Array, difficulty: Array | None) -> Array:
    """(P, K): intercept, length, and difficulty where it is known."""
    return np.column_stack([np.ones(len(longer)), _length_term(longer), *([] if difficulty is None else [difficulty])])


def _length_term(longer: Array) -> Array:
    longer = np.asarray(longer, dtype=np.float64)
    spread = longer.std()
    return np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)


def _chance(logits: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(logits))


class _Prior(NamedTuple):
    """Means and precisions of Gaussian priors on the coefficients, (K,) each."""

    means: Array
    precisions: Array


def _weak(size: int) -> _Prior:
    return _Prior(np.zeros(size), np.array([0.0, WEAK, WEAK])[:size])


def _prior(wins: Array, features: Array, usual: tuple[float, float] | None) -> _Prior:
    """The weak prior, or the pull to what is usual that predicts left-out prompts best."""
    size = features.shape[1]
    if usual is None:
        return _weak(size)
    means = np.array([0.0, *usual])[:size]
    pulls = [_Prior(means, np.array([0.0, pull, pull])[:size]) for pull in PRECISIONS]
    fold = np.arange(len(wins)) % FOLDS

    def missed(prior: _Prior) -> float:
        total = 0.0
        for k in range(FOLDS):
            logits = features[fold == k] @ _fit(wins[fold != k], features[fold != k], prior)
            total += float(np.logaddexp(0, logits).sum() - wins[fold == k] @ logits)
        return total

    return min(pulls, key=missed)


def _fit(wins: Array, features: Array, prior: _Prior) -> Array:
    """(K,) coefficients of the best fit."""
    from scipy.optimize import minimize

    def loss(found: Array) -> float:
        logits = features @ found
        return float(np.logaddexp(0, logits).sum() - wins @ logits + prior.precisions @ (found - prior.means) ** 2 / 2)

    def slope(found: Array) -> Array:
        return (_chance(features @ found) - wins) @ features + prior.precisions * (found - prior.means)

    def curve(found: Array) -> Array:
        chance = _chance(features @ found)
        return (features * (chance * (1 - chance))[:, None]).T @ features + np.diag(prior.precisions)

    start = np.zeros(features.shape[1])
    return np.asarray(minimize(loss, start, jac=slope, hess=curve, method="trust-exact", options={"gtol": 1e-9}).x)


def _refits(counts: Array, wins: Array, features: Array, prior: _Prior, start: Array) -> Array:
    """(B, K) coefficients of B weighted fits at once by Newton's method: one by one they would take a minute a table.

    Args:
        counts: (B, P) weights.
        wins: (P,) soft targets.
        features: (P, K), the first of which is the intercept.
        prior: of the coefficients.
        start: (K,) coefficients of the fit to all prompts.
    """
    size = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    found = np.tile(np.clip(start, -_FARTHEST, _FARTHEST), (len(counts), 1))
    for _ in range(_STEPS):
        chance = _chance(found @ features.T)
        slope = (counts * (wins - chance)) @ features - prior.precisions * (found - prior.means)
        curve = ((counts * chance * (1 - chance)) @ products).reshape(-1, size, size)
        # Resamples that are all won leave no curvature for the intercept, which has no prior.
        step = np.linalg.solve(curve + np.diag(prior.precisions + 1e-9), slope[:, :, None])[:, :, 0]
        # Where the curve is flat Newton's steps go too far.
        found = np.clip(found + np.clip(step, -2, 2), -_FARTHEST, _FARTHEST)
        if np.abs(step).max() < 1e-10:
            break
    return found


def fit_jointly(rows: Iterable[Judged]) -> Joint | None:
    """How much better than elsewhere models do on each prompt (Dubois et al. 2024, step 1), and what is usual.

    Fitted to all models together is ``logit P(win) = a_m + b_m * tanh(longer / sd_m(longer)) + difficulty_x``, with
    Gaussian priors of variance 1 on the difficulties and of variance 100 on the slopes.

    Returns:
        None where fewer than :data:`FEWEST_MODELS` models are in the rows.
    """
    from scipy.optimize import minimize

    models: dict[str, list[Judged]] = {}
    for row in rows:
        models.setdefault(row[0], []).append(row)
    if (count := len(models)) < FEWEST_MODELS:
        return None
    ordered = [row for own in models.values() for row in own]
    prompts = {prompt: k for k, prompt in enumerate(dict.fromkeys(row[1] for row in ordered))}
    at = np.array([prompts[row[1]] for row in ordered])
    of = np.repeat(np.arange(count), [len(own) for own in models.values()])
    wins = np.array([row[2] for row in ordered])
    length = np.concatenate([_length_term(np.array([row[3] for row in own])) for own in models.values()])
    pull = np.concatenate([np.zeros(count), np.full(count, WEAK), np.ones(len(prompts))])

    def loss(found: Array) -> tuple[float, Array]:
        level, slope, hard = np.split(found, [count, 2 * count])
        logits = level[of] + slope[of] * length + hard[at]
        off = _chance(logits) - wins
        parts = [np.bincount(of, off), np.bincount(of, off * length), np.bincount(at, off, len(prompts))]
        height = np.logaddexp(0, logits).sum() - wins @ logits + pull @ found**2 / 2
        return float(height), np.concatenate(parts) + pull * found

    found = minimize(
        loss, np.zeros(len(pull)), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-7, "ftol": 1e-15}
    ).x
    hard = found[2 * count :] - found[2 * count :].mean()
    weights = []
    for number in range(count):
        own = of == number
        features = np.column_stack([np.ones(own.sum()), length[own], hard[at[own]]])
        weights.append(_fit(wins[own], features, _weak(3))[1:])
    usual = np.median(weights, axis=0)
    return Joint({prompt: float(hard[k]) for prompt, k in prompts.items()}, (float(usual[0]), float(usual[1])))
