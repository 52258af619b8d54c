"""One record before a judge: the questions asked about it, what came of them, and what that adds up to."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.scorers.criteria import Criterion
from rankalign.scorers.judge_prompts import JudgePrompt
from rankalign.scorers.verdicts import Ratings
from rankalign.scorers.written import Written


@dataclass
class Call:
    """One question to the judge and what came of it.

    Attributes:
        shown: which of the record's distinct texts, in the order shown.
        prompt: what the judge is asked.
        asked: the judge's prompt behind it, which reads the verdict.
        question: its number among the questions about the record; those that ask the same again have the same.
        repeat: how often it was asked the same before.
        text: what it wrote.
        repair: what it wrote when asked for its verdict again; None where it was not.
        failed: why there is no text, and after how many tries; None where there is one.
        verdict: numbers by name for each text shown; None where none could be read.
        mass: of a weighted verdict, the probability that stood on grades, by axis.
    """

    shown: tuple[int, ...]
    prompt: CandidateSet
    asked: JudgePrompt
    text: str = ""
    repair: str | None = None
    verdict: list[Ratings] | None = None
    question: int = 0
    failed: dict[str, Any] | None = None
    repeat: int = 0
    mass: Ratings | None = None


@dataclass
class Case:
    """One record before the judge.

    Attributes:
        record: prompt and responses.
        texts: its distinct texts; identical answers are judged once.
        places: for each response, which of them it is.
        attempts: imitations of verdicts and orders to the judge in each text, by kind.
        prompt: what it is asked by.
        criteria: of a record that has its own.
        calls: the questions asked about it.
        written: what the writer of its criteria said; None where they were there.
    """

    record: CandidateSet
    texts: list[str]
    places: list[int]
    attempts: list[dict[str, int]]
    prompt: JudgePrompt
    criteria: Sequence[Criterion] = ()
    calls: list[Call] = field(default_factory=list)
    written: Written | None = None

    def by_repeat(self) -> list[list[Call]]:
        """The calls of each time of asking."""
        times = sorted({call.repeat for call in self.calls})
        return [[call for call in self.calls if call.repeat == number] for number in times]


def rankings(case: Case, mode: str) -> list[list[float | None]]:
    """The verdicts as rankings of all texts; of a pair only where both orders could be read."""
    read = {call.shown for call in case.calls if call.verdict is not None}
    found: list[list[float | None]] = []
    for call in case.calls:
        if call.verdict is not None and (mode == "listwise" or call.shown[::-1] in read):
            ranks: list[float | None] = [None] * len(case.texts)
            for place, ratings in zip(call.shown, call.verdict, strict=True):
                ranks[place] = rank(ratings)
            found.append(ranks)
    return found


def rank(ratings: Ratings) -> float:
    """A rank, or minus what is better when higher."""
    return ratings["rank"] if "rank" in ratings else -sum(ratings.values())


def given(case: Case, place: int) -> list[Ratings]:
    """What a text was given, one entry a verdict."""
    return [call.verdict[call.shown.index(place)] for call in case.calls if call.verdict and place in call.shown]


def mean(given: Sequence[Ratings]) -> Ratings:
    """The mean of what a text was given, by axis."""
    return {axis: sum(ratings[axis] for ratings in given) / len(given) for axis in (given[0] if given else {})}


def spread(scores: Sequence[float | None]) -> float | None:
    """Standard deviation (n - 1) of the scores that are there; None for fewer than two."""
    known = [score for score in scores if score is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def counts(case: Case, mode: str) -> dict[str, int]:
    """Numbers that can be added up over records."""
    found = {
        "calls": len(case.calls),
        "parsed": sum(call.verdict is not None for call in case.calls),
        "repaired": sum(call.repair is not None and call.verdict is not None for call in case.calls),
        "attempts": sum(sum(case.attempts[place].values()) for place in case.places),
    }
    if failed := sum(call.failed is not None for call in case.calls):
        found["failed"] = failed
    if any(call.repeat for call in case.calls):
        found |= _repeated(case)
    if mode == "pairwise":
        once = [call for call in case.calls if not call.repeat]
        ranks = {call.shown: [rank(r) for r in call.verdict] for call in once if call.verdict}
        both = [(own, ranks[shown[::-1]]) for shown, own in ranks.items() if shown[::-1] in ranks]
        same = sum(_sign(a) == -_sign(b) for a, b in both) // 2  # each pair stands in it twice, from either order
        found |= {"pairs": len(both) // 2, "consistent": same}
    return found


def _repeated(case: Case) -> dict[str, int]:
    """How many verdicts were asked for again and read both times, and how many of these came out alike."""
    firsts = {call.question: _meaning(call) for call in case.calls if not call.repeat and call.verdict}
    again = [(firsts.get(call.question), _meaning(call)) for call in case.calls if call.repeat and call.verdict]
    read = [(first, second) for first, second in again if first is not None]
    return {"repeated": len(read), "repeated_alike": sum(first == second for first, second in read)}


def _meaning(call: Call) -> list[float]:
    """What a verdict says: the grade of one text, or which of several stand above which."""
    worth = [-rank(ratings) for ratings in call.verdict or ()]
    return worth if len(worth) == 1 else [_sign(pair) for pair in itertools.combinations(worth, 2)]


def _sign(ranks: Sequence[float]) -> int:
    return (ranks[0] > ranks[1]) - (ranks[0] < ranks[1])
