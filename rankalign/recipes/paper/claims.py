"""What the RRHF paper claims, held against figures of our own: held, did not hold, or not decided by the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from rankalign.evaluation.report.hack import REPETITION
from rankalign.evaluation.statistics import DRAWS, Array, Interval, percentile_interval

MARGIN = 0.05
"""Reward that counts as nothing, where "not worse" is asked."""
SIMILAR = 1.25
"""Perplexities up to this factor apart count as similar; in the paper's table 2 Alpaca's are 1.07 apart."""


class Verdict(StrEnum):
    """What the figures say of a claim."""

    HELD = "held"
    FAILED = "did not hold"
    OPEN = "not decided"


@dataclass(frozen=True)
class Results:
    """The table's figures: S seeds, P held-out prompts, Q training prompts, the same ones in all rows.

    Attributes:
        held: by row and measure (``reward``, ``nats``, ``tokens``, ``repetition``, ``words``, ``kl``), (S, P): a
            held-out prompt's mean over its answers, of ``nats`` and ``tokens`` the sum.
        pool: by row that has a fixed set of candidates, and ``mean`` or ``max``, (S, Q): over a prompt's candidates.
        costs: by row and name (see :class:`rankalign.recipes.paper.costs.Cost`), (S,).
    """

    held: Mapping[str, Mapping[str, Array]]
    pool: Mapping[str, Mapping[str, Array]]
    costs: Mapping[str, Mapping[str, Array]]


class Resamples:
    """Bootstrap over prompts and seeds at once (Owen 2007, "the pigeonhole bootstrap", arXiv:0712.1111).

    Each draw takes seeds with replacement and prompts with replacement, and every figure of the table from these. The
    figures themselves stand in front of the draws: element 0 of all arrays here weighs each seed and prompt once.

    Args:
        results: the figures.
        draws: number of resamples.
        seed: of numpy's PCG64 generator.
    """

    def __init__(self, results: Results, draws: int = DRAWS, seed: int = 0) -> None:
        self.results = results
        rng = np.random.default_rng(seed)
        held = next(iter(next(iter(results.held.values())).values()))
        pool = next((next(iter(row.values())) for row in results.pool.values()), held)
        self._seeds, self._held, self._pool = (
            _weights(rng, size, draws) for size in (len(held), held.shape[1], pool.shape[1])
        )

    def sums(self, row: str, measure: str) -> Array:
        """(1 + draws,) sum of a row's measure over seeds and held-out prompts."""
        return self._sums(self.results.held[row][measure], self._held)

    def mean(self, row: str, measure: str) -> Array:
        """(1 + draws,) mean over seeds and held-out prompts."""
        return self.sums(row, measure) / self.results.held[row][measure].size

    def perplexity(self, row: str) -> Array:
        """(1 + draws,) exp(nats / tokens) over all answers."""
        return np.asarray(np.exp(self.sums(row, "nats") / self.sums(row, "tokens")))

    def pool_mean(self, row: str, measure: str) -> Array:
        """(1 + draws,) mean over seeds and training prompts of the candidates' ``mean`` or ``max``."""
        values = self.results.pool[row][measure]
        return self._sums(values, self._pool) / values.size

    def _sums(self, values: Array, prompts: Array) -> Array:
        return np.asarray(((self._seeds @ values) * prompts).sum(axis=1))


def _weights(rng: np.random.Generator, size: int, draws: int) -> Array:
    """(1 + draws, size): how often each of ``size`` things is drawn; the first row takes each once."""
    drawn = rng.multinomial(size, [1 / size] * size, draws)
    return np.concatenate([np.ones((1, size)), drawn.astype(np.float64)])


@dataclass(frozen=True)
class Finding:
    """One figure with its interval, and where it has to lie.

    Attributes:
        text: what it is.
        value: the figure.
        interval: 95 %.
        bound: what it is compared with.
        above: whether it has to lie above the bound, or below.
    """

    text: str
    value: float
    interval: Interval
    bound: float
    above: bool = True

    @property
    def verdict(self) -> Verdict:
        """Held if the whole interval is on the right side, failed if it is on the wrong one, else open."""
        low, high = self.interval
        right, wrong = (low > self.bound, high <= self.bound) if self.above else (high < self.bound, low >= self.bound)
        return Verdict.HELD if right else Verdict.FAILED if wrong else Verdict.OPEN


@dataclass(frozen=True)
class Claim:
    """A claim and what was found.

    Attributes:
        text: the claim.
        source: where the paper makes it.
        findings: what it rests on; empty where rows are missing.
        every: whether all findings have to hold, or any of them.
        missing: names of the rows that the table does not have.
    """

    text: str
    source: str
    findings: tuple[Finding, ...] = ()
    every: bool = True
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Of all findings together; a claim without findings is open."""
        found = {finding.verdict for finding in self.findings}
        decisive = Verdict.FAILED if self.every else Verdict.HELD
        if decisive in found:
            return decisive
        return found.pop() if len(found) == 1 else Verdict.OPEN


def finding(text: str, draws: Array, bound: float = 0.0, above: bool = True) -> Finding:
    """A finding from an array of :class:`Resamples`: the figure, then the draws."""
    return Finding(text, float(draws[0]), percentile_interval(draws[1:]), bound, above)


# --- the claims --------------------------------------------------------------------------------------------------


def as_good_as_ppo(of: Resamples) -> tuple[Finding, ...]:
    """Reward not worse, and text that is as likely under the start model."""
    reward = of.mean("rrhf_dp", "reward") - of.mean("ppo", "reward")
    ratio = of.perplexity("rrhf_dp") / of.perplexity("ppo")
    return (
        finding(f"reward of RRHF DP less that of PPO with KL is above -{MARGIN}", reward, -MARGIN),
        finding(f"perplexity of RRHF DP over that of PPO with KL is below {SIMILAR}", ratio, SIMILAR, above=False),
    )


def cheaper_than_ppo(of: Resamples) -> tuple[Finding, ...]:
    """Fewer models, less memory; the intervals are the range over the seeds."""
    parts = (("models", "models in memory", 1.0), ("peak_bytes", "peak memory, GB", 1e9))
    return tuple(
        _ranged(f"{text}: RRHF DP less PPO with KL is below 0", _cost(of, "rrhf_dp", key) - _cost(of, "ppo", key), unit)
        for key, text, unit in parts
    )


def _cost(of: Resamples, row: str, key: str) -> Array:
    return of.results.costs[row][key]


def _ranged(text: str, by_seed: Array, unit: float) -> Finding:
    values = by_seed / unit
    return Finding(text, float(values.mean()), Interval(float(values.min()), float(values.max())), 0.0, above=False)


def rank_loss_helps(of: Resamples) -> tuple[Finding, ...]:
    """The same candidates with and without the rank loss."""
    gain = of.mean("rrhf_dp", "reward") - of.mean("no_rank", "reward")
    return (finding("reward of RRHF DP less that of the same without rank loss is above 0", gain),)


def more_policies_help(of: Resamples) -> tuple[Finding, ...]:
    """Both sources of answers against each alone."""
    both = of.mean("rrhf_dp", "reward")
    return tuple(
        finding(f"reward of RRHF DP less that of RRHF {label} is above 0", both - of.mean(row, "reward"))
        for row, label in (("rrhf_d", "D"), ("rrhf_p", "P"))
    )


def learns_the_best(of: Resamples) -> tuple[Finding, ...]:
    """Equation 7: test reward is nearer to the candidates' expected maximum than to their mean."""
    found = []
    for row, label in (("rrhf_d", "D"), ("rrhf_p", "P"), ("rrhf_dp", "DP")):
        middle = (of.pool_mean(row, "mean") + of.pool_mean(row, "max")) / 2
        text = f"{label}: test reward less the middle between the training candidates' mean and maximum is above 0"
        found.append(finding(text, of.mean(row, "reward") - middle))
    return tuple(found)


def online_hacks(of: Resamples) -> tuple[Finding, ...]:
    """What a scorer does not see: text that repeats itself, or that the start model finds strange."""
    rise = of.mean("rrhf_op", "repetition") - of.mean("start", "repetition")
    ratio = of.perplexity("rrhf_op") / of.perplexity("start")
    return (
        finding(f"repeated 3-grams: RRHF OP without KL less the start model is above {REPETITION}", rise, REPETITION),
        finding(f"perplexity of RRHF OP without KL over the start model's is above {SIMILAR}", ratio, SIMILAR),
    )


@dataclass(frozen=True)
class Statement:
    """A claim of the paper: text, where it stands, the rows it needs, and how it is looked into."""

    text: str
    source: str
    rows: tuple[str, ...]
    look: Callable[[Resamples], tuple[Finding, ...]]
    every: bool = True


STATEMENTS = (
    Statement(
        "RRHF reaches at least PPO's reward at similar perplexity", "table 2", ("rrhf_dp", "ppo"), as_good_as_ppo
    ),
    Statement("RRHF needs fewer models and less memory than PPO", "abstract", ("rrhf_dp", "ppo"), cheaper_than_ppo),
    Statement(
        "the rank loss beats fine-tuning on the best answer alone", "table 7", ("rrhf_dp", "no_rank"), rank_loss_helps
    ),
    Statement("more sampling policies help", "table 6", ("rrhf_dp", "rrhf_d", "rrhf_p"), more_policies_help),
    Statement(
        "RRHF learns the best of the candidates: test reward is near the training maximum",
        "equation 7, table 6",
        ("rrhf_dp", "rrhf_d", "rrhf_p"),
        learns_the_best,
    ),
    Statement(
        "online sampling without KL hacks the reward",
        "table 6, OP-32; appendix D",
        ("rrhf_op", "start"),
        online_hacks,
        every=False,
    ),
)


def claims(of: Resamples, statements: Sequence[Statement] = STATEMENTS) -> list[Claim]:
    """Every claim with its findings; one whose rows the table lacks stays open and names them."""
    found = []
    for one in statements:
        missing = tuple(row for row in one.rows if row not in of.results.held)
        found.append(Claim(one.text, one.source, () if missing else one.look(of), one.every, missing))
    return found


def divergence_bound(n: int) -> float:
    """Most nats from best-of-n to its start model: ``log n - (n - 1) / n`` (Beirami et al. 2024, arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n
