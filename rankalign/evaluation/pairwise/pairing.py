"""Two systems before a live judge: prompts by category, both orders, and reviews in FastChat's form to count them by.

The judging itself is a scoring run (resumable, shardable, see :mod:`rankalign.stages.generation`); this module makes
its input and turns its output into the reviews that ``rankalign compare --reviews`` reads. So a verdict is counted in
one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.errors import InputError
from rankalign.evaluation import Row
from rankalign.evaluation.pairwise.scores import match
from rankalign.scorers import JUDGE, summary

GENERAL = "general"
# The prompt for each kind of question; `prompts` in the judge's settings overrules it.
PROMPTS = {GENERAL: "two-scores", "coding": "two-scores-coding", "math": "two-scores-math"}


def pair_up(
    a: Sequence[CandidateSet],
    b: Sequence[CandidateSet],
    names: tuple[str, str],
    categories: Mapping[str, str] | None = None,
) -> dict[str, list[CandidateSet]]:
    """Records that hold one answer of each system, by kind of question.

    Args:
        a: records of the first system, one answer a prompt.
        b: records of the second, on the same prompts.
        names: what to call the two.
        categories: category by prompt id; without it ``meta["category"]`` says it.

    Returns:
        Records by ``general``, ``coding`` or ``math``, the kinds that occur; other categories are general. A reference
        answer in the first system's ``meta["reference"]`` goes along, for prompts that show one.

    Raises:
        InputError: the prompts do not match, a prompt has several answers, or the names are equal.
    """
    if names[0] == names[1]:
        raise InputError(f"both systems are called {names[0]!r}; tell them apart with --names")
    found: dict[str, list[CandidateSet]] = {}
    for left, right in match(a, b):
        for record in (left, right):
            if len(record.responses) != 1:
                found_here = len(record.responses)
                raise InputError(f"prompt {record.id!r}: a judge compares one answer of each, found {found_here}")
        category = (categories or {}).get(left.id) or str(left.meta.get("category", ""))
        responses = [replace(r.responses[0], policy=n, scores={}) for r, n in zip((left, right), names, strict=True)]
        told = {"category": category, "reference": left.meta.get("reference")}
        record = CandidateSet(left.id, left.prompt, responses, {key: value for key, value in told.items() if value})
        found.setdefault(category if category in PROMPTS else GENERAL, []).append(record)
    return found


def reviews(judged: Sequence[CandidateSet], judge: str) -> Iterator[Row]:
    """What a pairwise judge said, a row a call, as FastChat writes it; ``[-1, -1]`` where no verdict could be read.

    Args:
        judged: records of :func:`pair_up`, scored by a judge that explains itself.
        judge: its name.
    """
    for record in judged:
        for number, call in enumerate(record.meta.get(JUDGE + judge, {}).get("calls", ())):
            systems = [record.responses[i].policy for i in call["shown"]]
            yield {
                "review_id": f"{record.id}/{number}",
                "question_id": record.id,
                "model_1": systems[0],
                "model_2": systems[1],
                "reviewer_id": judge,
                "category": record.meta.get("category", ""),
                "text": call.get("repair") or call["text"],
                "score": _points(call["verdict"]),
                # Ratings on several axes are added up, so their sum may go beyond the scale of one.
                "scale": [0, 10 * max(len(call["verdict"][0]) if call["verdict"] else 1, 1)],
            }


def _points(verdict: Sequence[Mapping[str, float]] | None) -> list[float]:
    return [-1, -1] if verdict is None else [sum(ratings.values()) for ratings in verdict]


def identical(judged: Sequence[CandidateSet]) -> int:
    """Prompts that both systems answered in the same words, which no judge is asked about."""
    return sum(record.responses[0].shown() == record.responses[1].shown() for record in judged)


def counts(judged: Sequence[CandidateSet], judge: str) -> dict[str, Any]:
    """Calls, parsed calls, parse rate, attempts on the judge, and identical answers, over all records."""
    return {**summary(judged).get(JUDGE + judge, {}), "identical": identical(judged)}
