"""What the RRHF paper claims, held against figures of our own: held, did not hold, or not decided by the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from rankalign.evaluation.report.hack import REPETITION
from rankalign.evaluation.statistics import DRAWS, Array, Interval, percentile_interval
from rankalign.recipes.paper.power import Needed, half_width, needed

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
        costs: by row and name (see :class:`rankalign.recipes.paper.costs.Cost`), and ``models``, (S,).
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
        parts: (S, P) each, the paired values that it is the mean of; empty where it is none.
    """

    text: str
    value: float
    interval: Interval
    bound: float
    above: bool = True
    parts: tuple[Array, ...] = ()

    @property
    def needed(self) -> Needed | None:
        """What would decide it, if the figure stays what it is; None where it is decided, or lies on its bound.

        The bootstrap's interval is wider than that of the closed form (it is a cautious one), so the distance that the
        latter has to reach is shorter by as much: more of either is asked than there is.
        """
        distance = abs(self.value - self.bound)
        if not self.parts or not distance or self.verdict != Verdict.OPEN:
            return None
        low, high = self.interval
        width = self.value - low if self.value > self.bound else high - self.value
        return needed(self.parts, distance * min(half_width(self.parts) / width, 1.0))

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


def finding(text: str, draws: Array, bound: float = 0.0, above: bool = True, parts: Sequence[Array] = ()) -> Finding:
    """A finding from an array of :class:`Resamples`: the figure, then the draws; ``parts`` as in :class:`Finding`."""
    return Finding(text, float(draws[0]), percentile_interval(draws[1:]), bound, above, tuple(parts))


def _gain(of: Resamples, text: str, row: str, other: str, bound: float = 0.0, measure: str = "reward") -> Finding:
    """How far a row is above another one, prompt by prompt."""
    own, theirs = of.results.held[row][measure], of.results.held[other][measure]
    return finding(text, of.mean(row, measure) - of.mean(other, measure), bound, parts=[own - theirs])


def _factor(of: Resamples, text: str, row: str, other: str, above: bool) -> Finding:
    """How many times a row's perplexity is another one's; its parts are the linear ones of both rows' nats a token."""
    ratio = of.perplexity(row) / of.perplexity(other)

    def linear(name: str) -> Array:
        nats, tokens = of.results.held[name]["nats"], of.results.held[name]["tokens"]
        return np.asarray((nats - nats.sum() / tokens.sum() * tokens) / tokens.mean())

    return finding(text, ratio, SIMILAR, above, [ratio[0] * (linear(row) - linear(other))])


# --- the claims --------------------------------------------------------------------------------------------------


def as_good_as_ppo(of: Resamples) -> tuple[Finding, ...]:
    """Reward not worse, and text that is as likely under the start model."""
    text = f"perplexity of RRHF DP over that of PPO with KL is below {SIMILAR}"
    return (
        _gain(of, f"reward of RRHF DP less that of PPO with KL is above -{MARGIN}", "rrhf_dp", "ppo", -MARGIN),
        _factor(of, text, "rrhf_dp", "ppo", above=False),
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
    return (_gain(of, "reward of RRHF DP less that of the same without rank loss is above 0", "rrhf_dp", "no_rank"),)


def more_policies_help(of: Resamples) -> tuple[Finding, ...]:
    """Both sources of answers against each alone."""
    return tuple(
        _gain(of, f"reward of RRHF DP less that of RRHF {label} is above 0", "rrhf_dp", row)
        for row, label in (("rrhf_d", "D"), ("rrhf_p", "P"))
    )


def learns_the_best(of: Resamples) -> tuple[Finding, ...]:
    """Equation 7: test reward is nearer to the candidates' expected maximum than to their mean."""
    found = []
    for row, label in (("rrhf_d", "D"), ("rrhf_p", "P"), ("rrhf_dp", "DP")):
        middle = (of.pool_mean(row, "mean") + of.pool_mean(row, "max")) / 2
        text = f"{label}: test reward less the middle between the training candidates' mean and maximum is above 0"
        pool = of.results.pool[row]
        parts = [of.results.held[row]["reward"], -(pool["mean"] + pool["max"]) / 2]
        found.append(finding(text, of.mean(row, "reward") - middle, parts=parts))
    return tuple(found)


def online_hacks(of: Resamples) -> tuple[Finding, ...]:
    """What a scorer does not see: text that repeats itself, or that the start model finds strange."""
    repeats = f"repeated 3-grams: RRHF OP without KL less the start model is above {REPETITION}"
    strange = f"perplexity of RRHF OP without KL over the start model's is above {SIMILAR}"
    return (
        _gain(of, repeats, "rrhf_op", "start", REPETITION, "repetition"),
        _factor(of, strange, "rrhf_op", "start", above=True),
    )


def as_good_without_a_critic(of: Resamples) -> tuple[Finding, ...]:
    """Leave-one-out and group baselines in the place of PPO's value model, at as many answers."""
    return tuple(
        _gain(of, f"reward of {label} less that of PPO with KL is above -{MARGIN}", row, "ppo", -MARGIN)
        for row, label in (("rloo", "RLOO"), ("grpo", "GRPO"))
    )


def fits_gaps_as_well(of: Resamples) -> tuple[Finding, ...]:
    """Regression on gaps in reward against PPO, at as many answers."""
    return (_gain(of, f"reward of REBEL less that of PPO with KL is above -{MARGIN}", "rebel", "ppo", -MARGIN),)


def own_answers_help(of: Resamples) -> tuple[Finding, ...]:
    """DPO on answers of the moment against DPO on a fixed set."""
    return (_gain(of, "reward of online DPO less that of DPO on fixed candidates is above 0", "online_dpo", "dpo"),)


def new_answers_against_ppo(of: Resamples) -> tuple[Finding, ...]:
    """The rank loss on answers of the moment against PPO, both with a KL: more reward, and no more time."""
    seconds = _cost(of, "rrhf_op_kl", "seconds") - _cost(of, "ppo", "seconds")
    return (
        _gain(of, "reward of RRHF OP with KL less that of PPO with KL is above 0", "rrhf_op_kl", "ppo"),
        _ranged("time, s: RRHF OP with KL less PPO with KL is below 0", seconds, 1.0),
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
    Statement(
        "policy gradients without a critic reach at least PPO's reward",
        "RLOO, arXiv:2402.14740; GRPO, arXiv:2402.03300",
        ("rloo", "grpo", "ppo"),
        as_good_without_a_critic,
    ),
    Statement("REBEL reaches at least PPO's reward", "REBEL, arXiv:2404.16767", ("rebel", "ppo"), fits_gaps_as_well),
    Statement(
        "DPO gains by learning from its own answers", "OAIF, arXiv:2402.04792", ("online_dpo", "dpo"), own_answers_help
    ),
    Statement(
        "RRHF on answers of the moment has more reward than PPO in less time",
        "a question of ours",
        ("rrhf_op_kl", "ppo"),
        new_answers_against_ppo,
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
