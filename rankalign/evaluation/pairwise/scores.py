"""Two systems on the same prompts: who scores higher, how often, and how sure one may be."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from rankalign.data.records import CandidateSet, score_of
from rankalign.data.spool import View
from rankalign.errors import InputError
from rankalign.evaluation import Row, drawn
from rankalign.evaluation.columns import Columns
from rankalign.evaluation.statistics import (
    Array,
    Interval,
    clopper_pearson,
    detectable_difference,
    mean_interval,
    paired_difference,
    sign_test,
)
from rankalign.evaluation.tables import Table, interval, some
from rankalign.storage.jsonl import dumps
from rankalign.storage.places import ABSENT, Places

Records = Sequence[CandidateSet]


@dataclass
class System:
    """One comparison of ``a`` with ``b``, seen from ``a``.

    Attributes:
        a: the first system.
        b: the second.
        sum_a: sum over prompts of a's scores, where both have one.
        sum_b: the same of b's.
        n: prompts where both have a score, and those that one of them forfeited.
        unparsed: prompts left out because a score is missing.
        win: prompts where a scores higher by more than the tie rule allows.
        tie: prompts within the tie rule.
        loss: prompts where b scores higher.
        difference: mean of a's score minus b's.
        ci95: bootstrap interval of ``difference`` over prompts.
        win_rate: ``(win + tie / 2) / n``.
        win_rate_ci95: its bootstrap interval.
        exact_ci95: exact binomial interval of the share of wins among decided prompts; None where none is decided.
        p_sign: two-sided sign test of wins against losses.
        detectable: smallest true difference of means that so many prompts would show (80 % power, 5 % level).
        bounds: the win rate if all prompts left out were losses, and if all were wins.
        extra: further keys for ``--json``.
    """

    a: str
    b: str
    sum_a: float
    sum_b: float
    n: int
    unparsed: int
    win: int
    tie: int
    loss: int
    difference: float
    ci95: Interval
    win_rate: float
    win_rate_ci95: Interval
    exact_ci95: Interval | None
    p_sign: float
    detectable: float
    bounds: Interval
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The entry of ``systems`` in ``--json``."""
        row = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items() if name != "extra"}
        return row | self.extra


@dataclass
class Comparison:
    """What ``rankalign compare`` found.

    Attributes:
        systems: one entry a pair of systems.
        parser: how the scores came about: ``score`` (a scorer's numbers), or a parser of judge texts.
        order_consistency: share of prompts judged alike in both orders; None where there are not two orders.
        rows: one entry a prompt, for tables and reports.
        extra: further keys for ``--json``.
    """

    systems: list[System]
    parser: str
    order_consistency: float | None = None
    rows: Sequence[Row] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        systems = [system.as_dict() for system in self.systems]
        return {"systems": systems, "parser": self.parser, "order_consistency": self.order_consistency} | self.extra

    def table(self) -> Table:
        """The comparison for people."""
        names = {
            "a": "a", "b": "b", "sum_a": "sum a", "sum_b": "sum b", "difference": "a − b", "ci95": "95 % interval",
            "win": "win", "tie": "tie", "loss": "loss", "exact_ci95": "won of decided, exact 95 %",
            "win_rate": "win rate", "n": "n", "unparsed": "unparsed", "detectable": "detectable a − b",
        }  # fmt: skip
        rows = [
            [interval(getattr(s, key)) if key.endswith("ci95") else getattr(s, key) for key in names]
            for s in self.systems
        ]
        consistency = (
            "one order" if self.order_consistency is None else f"order-consistent {self.order_consistency:.1%}"
        )
        note = f"seen from a; scores by: {self.parser}; {consistency}; intervals bootstrapped over prompts"
        return Table("Pairwise comparison", list(names.values()), rows, note)


def summarise(
    a: str,
    b: str,
    pairs: Sequence[tuple[float, float]] | Array,
    unparsed: int = 0,
    tie_delta: float = 0.0,
    seed: int = 0,
) -> System:
    """Compare paired scores, one pair a prompt.

    Args:
        a: name of the first system.
        b: name of the second.
        pairs: (a's score, b's score) of each prompt that has both.
        unparsed: how many prompts have not.
        tie_delta: scores this close are a tie; 0 asks for equal ones.
        seed: seed of the bootstrap.

    Raises:
        InputError: there is no pair.
    """
    if not len(pairs):
        raise InputError(f"no prompt has a score for both {a!r} and {b!r} ({unparsed} without)")
    first, second = np.asarray(pairs, dtype=np.float64).T
    gains = first - second
    signs = np.where(np.abs(gains) <= tie_delta, 0.0, np.sign(gains))
    win, loss, n = int((signs > 0).sum()), int((signs < 0).sum()), len(signs)
    gain = paired_difference(first, second, seed=seed)
    rate = mean_interval((1 + signs) / 2, seed=seed)
    points, asked = win + (n - win - loss) / 2, n + unparsed
    return System(
        a=a, b=b, sum_a=math.fsum(first), sum_b=math.fsum(second), n=n, unparsed=unparsed,
        win=win, tie=n - win - loss, loss=loss,
        difference=gain.value, ci95=gain.interval, win_rate=rate.value, win_rate_ci95=rate.interval,
        exact_ci95=clopper_pearson(win, win + loss) if win + loss else None,
        p_sign=sign_test(win, loss), detectable=detectable_difference(gains),
        bounds=Interval(points / asked, (points + unparsed) / asked),
    )  # fmt: skip


def compare_by_score(
    a: Sequence[CandidateSet],
    b: Sequence[CandidateSet],
    judge: str,
    names: tuple[str, str] = ("", ""),
    tie_delta: float = 0.0,
    seed: int = 0,
) -> Comparison:
    """Compare two files of responses by the scores of one judge, prompt by prompt.

    A prompt with several draws counts with their mean. A response without a score is missing, never a number: its
    prompt is left out and counted as ``unparsed``.

    Args:
        a: records of the first system.
        b: records of the second, on the same prompts in any order.
        judge: whose scores, higher is better.
        names: what to call them; empty takes the policy that answered, or "a" and "b".
        tie_delta: scores this close are a tie; 0 asks for equal ones.
        seed: seed of the bootstrap.

    Raises:
        InputError: the prompts do not match (the message names ids), or no prompt has both scores.
    """
    rows = Columns(absent=True)
    for left, right in match(a, b):
        rows.add(left.id, {"a": _mean_score(left, judge), "b": _mean_score(right, judge)})
    pairs = np.column_stack([rows.numbers("a"), rows.numbers("b")])
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    title_a, title_b = names[0] or _policy(a, "a"), names[1] or _policy(b, "b")
    system = summarise(title_a, title_b, pairs, len(rows) - len(pairs), tie_delta, seed)
    return Comparison([system], "score", None, rows, {"judge": judge, "tie_delta": tie_delta})


def align(
    a: Sequence[CandidateSet], b: Sequence[CandidateSet]
) -> tuple[Sequence[CandidateSet], Sequence[CandidateSet]]:
    """Files whose format has no ids got them from their own names, so no id is in both; their prompts match them."""
    known = Places()
    for record in a:
        known.add(record.id)
    if any(record.id in known for record in b):
        return a, b
    first, second = (View(side, range(len(side)), _by_prompt) for side in (a, b))
    return first, second


def _by_prompt(record: CandidateSet) -> CandidateSet:
    return replace(record, id=dumps(record.prompt))


class Pairs(Sequence[tuple[CandidateSet, CandidateSet]]):
    """Records of one file, each with that of another on the same prompt.

    Args:
        a: the first file.
        b: the second.
        at: of each record of ``a``, where its mate stands in ``b``.
    """

    def __init__(self, a: Sequence[CandidateSet], b: Sequence[CandidateSet], at: Sequence[int]) -> None:
        self.first, self.second = a, View[CandidateSet](b, at)

    def __len__(self) -> int:
        return len(self.first)

    @overload
    def __getitem__(self, index: int) -> tuple[CandidateSet, CandidateSet]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[CandidateSet, CandidateSet]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[CandidateSet, CandidateSet] | Sequence[tuple[CandidateSet, CandidateSet]]:
        if isinstance(index, slice):
            return View(self, range(len(self))[index])
        return self.first[index], self.second[index]

    def __iter__(self) -> Iterator[tuple[CandidateSet, CandidateSet]]:
        return zip(self.first, self.second, strict=True)


class _Side:
    """Where the ids of one file stand, and which stand there twice."""

    def __init__(self, sets: Sequence[CandidateSet]) -> None:
        self.places, self.twice = Places(), dict[str, None]()
        for number, record in enumerate(sets):
            if record.id in self.places:
                self.twice[record.id] = None
            self.places.put(record.id, number)


def match(a: Sequence[CandidateSet], b: Sequence[CandidateSet]) -> Pairs:
    """Records of both files with the same id, in the order of ``a``.

    Raises:
        InputError: ids stand in one file only, in one twice, or for different prompts; all of them are named.
    """
    left, right = _Side(a), _Side(b)
    wrong = []
    for own, which in ((left, "first"), (right, "second")):
        if own.twice:
            wrong.append(f"{len(own.twice)} prompts stand in the {which} file twice: {some(list(own.twice))}")
    for here, there, which in ((a, right, "first"), (b, left, "second")):
        if alone := list(dict.fromkeys(record.id for record in here if record.id not in there.places)):
            wrong.append(f"{len(alone)} prompts stand in the {which} file only: {some(alone)}")
    at, changed = array("q"), list[str]()
    for record in a:
        if (mate := right.places.find(record.id)) != ABSENT:
            at.append(mate)
            if record.prompt != b[mate].prompt:
                changed.append(record.id)
    if changed:
        wrong.append(f"{len(changed)} ids stand for different prompts in the two files: {some(changed)}")
    if wrong:
        way = " (--on-missing intersect leaves them out, loss counts them)" if " only: " in "".join(wrong) else ""
        raise InputError("; ".join(wrong) + way)
    return Pairs(a, b, at)


def length_leads(found: Comparison, a: Sequence[CandidateSet], b: Sequence[CandidateSet]) -> list[tuple[float, float]]:
    """By prompt of a comparison of two systems: how many characters a's answer is longer, and by how much a leads."""
    lengths = [_lengths(side) for side in (a, b)]
    leads = []
    for row in found.rows:
        one, other = (row["points_a"], row["points_b"]) if "points_a" in row else (row["a"], row["b"])
        if one is not None and other is not None:
            longer, shorter = (own(row["id"]) for own in lengths)
            if longer is not None and shorter is not None:
                leads.append((longer - shorter, one - other))
    return leads


def _lengths(sets: Sequence[CandidateSet]) -> Callable[[str], float | None]:
    """The mean length of the answers by id, where there are any."""
    places, numbers = Places(), array("d")
    for record in sets:
        if record.responses:
            places.put(record.id, len(numbers))
            numbers.append(_mean_length(record))
    return lambda ident: None if (at := places.find(ident)) == ABSENT else numbers[at]


def _mean_length(record: CandidateSet) -> float:
    texts = [len(response.shown()) for response in drawn(record)]
    return sum(texts) / len(texts)


def _mean_score(record: CandidateSet, judge: str) -> float | None:
    scores = [score_of(record, response, judge) for response in drawn(record)]
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(scores) else None


def _policy(sets: Sequence[CandidateSet], otherwise: str) -> str:
    policies = {response.policy for record in sets for response in record.responses}
    return policies.pop() if len(policies) == 1 else otherwise
