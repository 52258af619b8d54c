"""Scorers grade responses. One file each; add one by a file and a line in :data:`SCORERS`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rankalign.data.records import CandidateSet
from rankalign.registry import Entry, Registry


class Scorer(Protocol):
    """Grades all responses of a prompt together, so that pairwise and listwise judges fit.

    Constructed as ``Scorer(name, **options)``, where ``name`` is the key under which its scores are stored.
    """

    name: str

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """One score a response, in order; None where the judge gave none. Does not change the records."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on (kind, options, hash of code or weights), for resume checks and manifests."""
        ...


JUDGE = "judge:"


@dataclass(frozen=True)
class Explanation:
    """How the scores of one record came about; it becomes ``meta["judge:NAME"]`` of the record and its responses.

    Attributes:
        record: what concerns them all, JSON-like; ``counts`` in it are added up for the run's result.
        responses: what concerns each response, in order; empty where there is nothing to say.
        meta: what joins the record's ``meta`` under names of its own, where these are not taken.
    """

    record: dict[str, Any]
    responses: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Explainer(Protocol):
    """A scorer that can say more than a number."""

    def explain(self) -> list[Explanation]:
        """One explanation for each record of the last :meth:`Scorer.score`."""
        ...


@runtime_checkable
class Looking(Protocol):
    """A scorer that may go by what a record holds beside prompt and answers."""

    @property
    def goes_by_records(self) -> bool:
        """Whether it does."""
        ...

    def check(self, record: CandidateSet) -> None:
        """Raise ``RecordError`` for a record that lacks it, before anything is paid for."""
        ...


def grade(scorer: Scorer, sets: Sequence[CandidateSet]) -> list[Any]:
    """What is stored of each record's grades: the list of scores, or with an explanation an object that holds both."""
    scores = scorer.score(sets)
    if not isinstance(scorer, Explainer):
        return list(scores)
    return [
        {"scores": row, "record": told.record, "responses": told.responses} | ({"meta": told.meta} if told.meta else {})
        for row, told in zip(scores, scorer.explain(), strict=True)
    ]


def attach(record: CandidateSet, name: str, grades: Any) -> None:
    """Put into a record what :func:`grade` returned for it."""
    stored = grades if isinstance(grades, dict) else {"scores": grades, "record": {}, "responses": [{}] * len(grades)}
    key = JUDGE + name
    if stored["record"]:
        record.meta = {**stored.get("meta", {}), **record.meta, key: stored["record"]}
    for response, score, told in zip(record.responses, stored["scores"], stored["responses"], strict=True):
        response.scores[name] = score
        if told:
            response.meta = {**response.meta, key: told}


def summary(sets: Iterable[CandidateSet]) -> dict[str, dict[str, float]]:
    """By ``judge:NAME``, the counts of the explanations over all records, and the share of calls that could be read."""
    counts: dict[str, Counter[str]] = {}
    for record in sets:
        for key, told in record.meta.items():
            if key.startswith(JUDGE) and isinstance(told, dict):
                counts.setdefault(key, Counter()).update(told.get("counts", {}))
    return {key: {**found, **_shares(found)} for key, found in counts.items()}


def _shares(counts: Counter[str]) -> dict[str, float]:
    shares = {
        "parse_rate": (counts["parsed"], counts["calls"]),
        "consistency": (counts["consistent"], counts["pairs"]),
        "repeatability": (counts["repeated_alike"], counts["repeated"]),
    }
    return {name: part / whole for name, (part, whole) in shares.items() if whole}


SCORERS = Registry(
    "scorer",
    {
        "function": Entry(
            "rankalign.scorers.function:FunctionScorer", "a Python function, module:name or file.py:name"
        ),
        "judge": Entry(
            "rankalign.scorers.judge:JudgeScorer", "a language model behind any engine: grades, pairs or orders"
        ),
        "reward_model": Entry(
            "rankalign.scorers.reward_model:RewardModelScorer",
            "a sequence-classification model with one output, or one of several",
        ),
        "reward_server": Entry(
            "rankalign.scorers.reward_server:RewardServerScorer", "a reward model behind vLLM or any POST of JSON"
        ),
        "token_rewards": Entry(
            "rankalign.scorers.token_rewards:TokenRewardScorer", "a token classifier: a score a token, and one of them"
        ),
    },
)
