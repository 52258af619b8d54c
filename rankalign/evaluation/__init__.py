"""What came out: statistics, comparisons, perplexity, reward, reports. An evaluator is a function to an EvalResult."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.records import CandidateSet, Response, score_of
from rankalign.data.spool import View

Row = dict[str, Any]


@dataclass
class EvalResult:
    """What an evaluator found.

    Attributes:
        metrics: value by name; a quantity that the data do not define is left out, never set to NaN.
        n: how many units (prompts or texts, see the evaluator) the metrics rest on.
        ci95: 95 % interval by metric, bootstrapped over those units, for the metrics that have one.
        rows: one entry a unit, for tables and reports.
    """

    metrics: dict[str, float]
    n: int
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: Sequence[Row] = ()

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints: ``metrics``, ``n``, ``ci95``."""
        return {"metrics": self.metrics, "n": self.n, "ci95": {name: list(ci) for name, ci in self.ci95.items()}}


def drawn(record: CandidateSet) -> list[Response]:
    """The responses as they were drawn: one that stands for ``count`` identical draws appears that often."""
    return [response for response in record.responses for _ in range(response.count)]


CUT = 0.05
"""A larger share of answers that the token limit cut is worth a warning."""


def cut_warning(sets: Iterable[CandidateSet], whose: str = "the") -> str:
    """A sentence where many answers were cut at the token limit; empty where few were.

    Args:
        sets: records with answers.
        whose: whose answers, for the message.
    """
    answers = cut = 0
    for record in sets:
        for response in record.responses:
            answers += response.count
            cut += 0 if response.finished else response.count
    if not answers or cut < CUT * answers:
        return ""
    return (
        f"{cut / answers:.0%} of {whose} answers ({cut} of {answers}) were cut at the token limit: what is "
        "measured is how answers begin; sample with a higher max_new_tokens."
    )


def scored(record: CandidateSet, judge: str) -> list[float]:
    """The scores that ``judge`` gave, one a draw; draws without a score are left out (the evaluators count them)."""
    return [score for response in drawn(record) if (score := score_of(record, response, judge)) is not None]


def answers_of(record: CandidateSet, policy: str) -> CandidateSet:
    """The record with the answers of one policy alone."""
    own = [response for response in record.responses if response.policy == policy]
    return CandidateSet(record.id, record.prompt, own, record.meta)


def policies(sets: Iterable[CandidateSet]) -> list[str]:
    """Who answered, in order of first sight."""
    return list(dict.fromkeys(response.policy for record in sets for response in record.responses))


def only_policy(sets: Sequence[CandidateSet], policy: str) -> View[CandidateSet]:
    """The records that a policy answered, with its answers alone; none where it answered none."""
    there = (any(response.policy == policy for response in record.responses) for record in sets)
    at = array("Q", (number for number, own in enumerate(there) if own))
    return View(sets, at, lambda record: answers_of(record, policy))


def by_policy(sets: Iterable[CandidateSet]) -> dict[str, list[CandidateSet]]:
    """The records split by who answered: each policy's hold its own responses only."""
    split: dict[str, list[CandidateSet]] = {}
    for record in sets:
        for policy in dict.fromkeys(response.policy for response in record.responses):
            split.setdefault(policy, []).append(answers_of(record, policy))
    return split
