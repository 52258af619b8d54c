"""What a judge's own verdicts say against it: nothing readable, one place, length alone, one score for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.scorers import JUDGE

FEWEST = 10
"""Verdicts below which a share means nothing."""
READABLE = 0.9  # a smaller share of readable verdicts is named
ONE_SIDED = 0.9
"""From this share of one place, or of longer answers, on, that explains the verdicts better than the answers do."""


def judge_flags(sets: Sequence[CandidateSet]) -> list[str]:
    """Sentences about the judges of scored records, one a suspicion; a judge is known by its ``meta["judge:NAME"]``."""
    flags = []
    for key in dict.fromkeys(key for record in sets for key in record.meta if key.startswith(JUDGE)):
        judged = [(record, record.meta[key]) for record in sets if isinstance(record.meta.get(key), dict)]
        flags += [f"judge {key.removeprefix(JUDGE)!r} {said}" for said in _said(judged, key)]
    return flags


def _said(judged: Sequence[tuple[CandidateSet, dict[str, Any]]], key: str) -> Iterator[str]:
    calls = [call for _, told in judged for call in told.get("calls", ())]
    read = [call["verdict"] for call in calls if call.get("verdict")]
    if not calls:
        return
    if len(read) < READABLE * len(calls):
        yield f"could be read in {len(read)} of {len(calls)} verdicts" + ("" if read else ": there is no result")
    yield from _of_place([verdict for verdict in read if len(verdict) > 1])
    records = [record for record, _ in judged]
    yield from _of_length(list(_leads(records, key.removeprefix(JUDGE))))
    scores = [s for r in records for s in r.scores(key.removeprefix(JUDGE)) if s is not None]
    if len(scores) >= FEWEST and len(set(scores)) == 1 and all(len(verdict) == 1 for verdict in read):
        yield f"gives {scores[0]:g} to all {len(scores)} answers: it tells none from another"


def _of_place(verdicts: Sequence[Sequence[dict[str, float]]]) -> Iterator[str]:
    """Whether the best of a call is nearly always the one shown first, or last."""
    best = [places[0] for verdict in verdicts if len(places := _best(verdict)) == 1]
    if len(best) < FEWEST:
        return
    for place, said in ((0, "first"), (-1, "last")):
        count = sum(b == place % len(verdict) for b, verdict in zip(best, _decided(verdicts), strict=True))
        if count >= ONE_SIDED * len(best):
            yield f"prefers the answer shown {said} in {count} of {len(best)} verdicts: it goes by the place"


def _decided(verdicts: Iterable[Sequence[dict[str, float]]]) -> list[Sequence[dict[str, float]]]:
    return [verdict for verdict in verdicts if len(_best(verdict)) == 1]


def _best(verdict: Sequence[dict[str, float]]) -> list[int]:
    worth = [-each["rank"] if "rank" in each else sum(each.values()) for each in verdict]
    return [place for place, value in enumerate(worth) if value == max(worth)]


def _leads(records: Sequence[CandidateSet], judge: str) -> Iterator[bool]:
    """For each pair of answers of a prompt that differ in score and in length: whether the longer one leads."""
    for record in records:
        scored = zip(record.responses, record.scores(judge), strict=True)
        known = {
            response.shown(): score for response, score in scored if score is not None
        }  # equal texts are one answer
        for (one, a), (other, b) in combinations(known.items(), 2):
            if len(one) != len(other) and a != b:
                yield (len(one) > len(other)) == (a > b)


def _of_length(longer: Sequence[bool]) -> Iterator[str]:
    if len(longer) < FEWEST:
        return
    for wins, said in ((sum(longer), "longer"), (len(longer) - sum(longer), "shorter")):
        if wins >= ONE_SIDED * len(longer):
            yield f"puts the {said} answer above in {wins} of {len(longer)} pairs: it may count words"
