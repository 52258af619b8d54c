"""JudgeBench (Tan et al. 2024, arXiv:2410.12784): pairs of which one answer is right, judged in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError
from rankalign.evaluation.statistics import mean_interval
from rankalign.evaluation.suites import Asked, SuiteResult, coverage, doubles, once, rows_of
from rankalign.evaluation.tables import Table, interval

LABELS = ("A>B", "B>A")
FLIPPED = {"A>B": "B>A", "B>A": "A>B", "A=B": "A=B", None: None}
CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""By how a source begins, the column of the published tables."""


@dataclass(frozen=True)
class Judged:
    """One pair: who is right, and what the judge decided in each order, the second turned back; None: nothing read."""

    id: str
    category: str
    label: str
    decisions: tuple[str | None, ...]

    @property
    def right(self) -> float:
        """1 where the judge counts as right.

        The published rule on two orders: a decision for the right answer is 1, one for the wrong answer -1, any other
        (a tie, nothing) 0; the pair counts where their sum is above 0. One order counts where it decides rightly.
        """
        worth = [(d == self.label) - (d == FLIPPED[self.label]) for d in self.decisions]
        return float(sum(worth) > 0)


def _pair(check: Checker, row: dict[str, Any]) -> Judged:
    label = check.need(row, "label")
    if label not in LABELS:
        raise check.fail("label", f"expected A>B or B>A, found {label!r}")
    judgments = check.array(check.need(row, "judgments"), "judgments", at_least=1)
    if len(judgments) > 2:
        raise check.fail("judgments", f"expected one or two, found {len(judgments)}")
    found = [_decision(check, each, f"judgments[{k}]") for k, each in enumerate(judgments)]
    decisions = (found[0], *(FLIPPED[each] for each in found[1:]))
    source = str(row.get("source", ""))
    category = next((name for begin, name in CATEGORIES.items() if source.startswith(begin)), source or "other")
    return Judged(str(check.need(row, "pair_id")), category, label, decisions)


def _decision(check: Checker, judgment: Any, path: str) -> str | None:
    decision = None if judgment is None else check.mapping(judgment, path).get("decision")
    if decision not in FLIPPED:
        raise check.fail(f"{path}.decision", f"expected A>B, B>A, A=B or null, found {decision!r}")
    return decision if decision is None else str(decision)


def evaluate(asked: Asked) -> SuiteResult:
    """Accuracy by category and in all, with how often the orders agree."""
    seen: dict[str, Judged] = {}
    twice = 0
    for check, row in rows_of(asked.files):
        pair = _pair(check, row)
        twice += not once(seen, pair.id, pair, check, "pair_id")
    pairs = list(seen.values())
    if not pairs:
        raise InputError(f"{', '.join(asked.files)}: holds no pairs")
    if len(orders := {len(pair.decisions) for pair in pairs}) > 1:
        raise InputError("some pairs were judged in one order and some in both; keep them in files of their own")
    groups: dict[str, list[Judged]] = {}
    for pair in pairs:
        groups.setdefault(pair.category, []).append(pair)
    named = {name: groups[name] for name in (*CATEGORIES.values(), *groups) if name in groups} | {"overall": pairs}
    found = {name: mean_interval([pair.right for pair in own], seed=asked.seed) for name, own in named.items()}
    metrics = {f"accuracy {name}": estimate.value for name, estimate in found.items()} | _facts(pairs)
    rows = [
        [name, 100 * e.value, interval([100 * b for b in e.interval]), len(named[name])] for name, e in found.items()
    ]
    remarks = doubles(twice)
    if asked.questions:
        remarks += coverage(seen, (row.get("pair_id") for _, row in rows_of([asked.questions])))
    if orders == {1}:
        remarks.append("judged in one order only: a preference for a place cannot be told from quality")
    note = "percent of pairs; a pair in both orders counts where more decisions are right than wrong"
    return SuiteResult(
        metrics,
        len(pairs),
        {f"accuracy {name}": estimate.interval for name, estimate in found.items()},
        [Table("JudgeBench", ["", "accuracy", "95 % interval", "pairs"], rows, note)],
        remarks,
    )


def _facts(pairs: Sequence[Judged]) -> dict[str, float]:
    """Shares of pairs on which all decisions are right, or wrong, or differ, and on which one could not be read."""
    tests = {
        "all_right": lambda pair: all(d == pair.label for d in pair.decisions),
        "none_right": lambda pair: all(d != pair.label for d in pair.decisions),
        "inconsistent": lambda pair: len(set(pair.decisions)) > 1,
        "unread": lambda pair: None in pair.decisions,
    }
    return {name: sum(map(test, pairs)) / len(pairs) for name, test in tests.items()}
