"""Scorers grade responses. One file each; add one by a file and a line in :data:`SCORERS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rankalign.records import CandidateSet
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


SCORERS = Registry(
    "scorer",
    {
        "function": Entry(
            "rankalign.scorers.function:FunctionScorer", "a Python function, module:name or file.py:name"
        ),
        "reward_model": Entry(
            "rankalign.scorers.reward_model:RewardModelScorer", "a sequence-classification model with one output"
        ),
    },
)
