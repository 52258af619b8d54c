"""How sure one may be of a share: the Wilson interval of lint, training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.95


def wilson(share: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """Score interval (Wilson 1927): close to ``level`` on average, also for few trials.

    Written out because scipy's takes whole counts: here half successes (ties) and a number of trials that a design
    effect made smaller count too. For whole ones it is ``scipy.stats.binomtest(...).proportion_ci(method="wilson")``.

    Args:
        share: of successes, 0 to 1.
        trials: how many, above 0.
        level: coverage asked for.
    """
    from scipy.special import ndtri

    z2 = float(ndtri((1 + level) / 2)) ** 2
    centre, scale = share + z2 / (2 * trials), 1 + z2 / trials
    reach = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def clustered_wilson(right: Sequence[float], trials: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of ``sum(right) / sum(trials)`` where the trials of one prompt go together.

    Wilson's, with as many trials as would have the variance of the ratio over prompts,
    ``sum (right_i - rate trials_i)^2 / (sum trials)^2`` (Kish's design effect), but no more than there are; as many as
    prompts where all trials agree, since that variance is then 0. None where there is no trial.
    """
    total = math.fsum(trials)
    if not total:
        return None
    rate = math.fsum(right) / total
    spread = math.fsum((r - rate * n) ** 2 for r, n in zip(right, trials, strict=True))
    agree = not 0 < rate < 1
    # The spread is 0 where all prompts have the same share; the bound keeps the quotient finite.
    count = sum(n > 0 for n in trials) if agree else min(total, rate * (1 - rate) * total**2 / max(spread, 1e-12))
    return wilson(rate, count)
