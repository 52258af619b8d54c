"""What stands in an output, counted while its records pass by."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.scorers import JUDGE, summary
from rankalign.scorers.audit import judge_flags


class Counts:
    """Counts of prompts, answers and scores; of records that a judge explained, the records themselves are kept."""

    def __init__(self) -> None:
        self._found = Counter[str]()
        # A judge is paid for each of them, so they never are many.
        self._judged: list[CandidateSet] = []

    def add(self, record: CandidateSet) -> CandidateSet:
        """The record as it is, counted."""
        found = self._found
        found["prompts"] += 1
        for response in record.responses:
            found["responses"] += response.count
            found["distinct"] += 1
            found["unfinished"] += not response.finished
            found["empty"] += 0 if response.shown(thoughts=True).strip() else response.count
            for score in response.scores.values():
                found["missing_scores" if score is None else "scores"] += 1
        if any(key.startswith(JUDGE) for key in record.meta):
            self._judged.append(record)
        return record

    def as_dict(self) -> dict[str, Any]:
        """All counts, and what the judges' own verdicts say against them."""
        names = ("prompts", "responses", "distinct", "unfinished", "empty", "scores", "missing_scores")
        flags = judge_flags(self._judged)
        return {
            **{name: self._found[name] for name in names},
            **summary(self._judged),
            **({"flags": flags} if flags else {}),
        }
