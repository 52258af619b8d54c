"""Prometheus' training data: what a judge compared (Preference-Collection) or graded (Feedback-Collection)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.aliases import number_in
from rankalign.data.formats.kept import note_of
from rankalign.data.formats.pairs import PairColumns, Scores, text_of, worded
from rankalign.data.formats.rated import Rated
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Response

_ASKED = {"instruction", "output", "input", "orig_criteria"}


@dataclass(frozen=True)
class PreferenceCollection(PairColumns):
    """Prometheus' Preference-Collection: ``orig_preference`` is judge ``preference``, ``orig_score_A`` and B ``score``.

    What the judge was asked (``instruction``) and said (``output``) is no prompt and no answer.
    """

    name = "prometheus"
    full = False
    prompts = ("orig_instruction",)
    reads = frozenset(
        _ASKED
        | {"orig_preference", "orig_score_A", "orig_score_B", "orig_feedback_A", "orig_feedback_B", "orig_feedback"}
    )

    def columns(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Always the same."""
        pair = ("orig_response_A", "orig_response_B")
        return pair if set(pair) <= row.keys() else None

    def verdicts(self, row: dict[str, Any], pair: tuple[str, str], check: Checker) -> Scores:
        """Of those columns that the row has."""
        found: Scores = {}
        if row.get("orig_preference") is not None:
            found[PREFERENCE] = worded(row["orig_preference"], "orig_preference", pair, check)
        names = ("orig_score_A", "orig_score_B")
        if all(row.get(name) is not None for name in names):
            one, two = (number_in(row[name], name, check) for name in names)
            found["score"] = (one, two)
        if not found:
            raise check.fail("orig_preference", "is missing, and so are the scores of A and B")
        return found

    def row_of(self, record: CandidateSet, better: Response, worse: Response) -> dict[str, Any]:
        """A is better."""
        texts = {"orig_response_A": better.text, "orig_response_B": worse.text}
        return {"orig_instruction": text_of(record), **texts, "orig_preference": "A"}


PAIR = PreferenceCollection()


@dataclass(frozen=True)
class Prometheus(Rated):
    """A graded answer has judge ``score``, of two the better one is told by ``preference`` and ``score``."""

    name = "prometheus"
    full = False
    prompts, answers = ("orig_instruction",), ("orig_response",)
    reads = PAIR.reads | {f"orig_score{grade}_description" for grade in range(1, 6)}

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of either collection."""
        if PAIR.columns(row) is not None:
            return PAIR.record(row, check)
        # `input` would pass for the prompt's context
        bare = {key: value for key, value in row.items() if key not in _ASKED}
        record = super().record(bare, check)
        record.responses[0].meta[self.name] |= {key: row[key] for key in row if key in _ASKED}
        return record

    def unread(self, record: CandidateSet) -> list[str]:
        """As of either collection."""
        return PAIR.unread(record) if _is_pair(record) else super().unread(record)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """As of either collection; pairs of a ranked list, the better one as A."""
        if _is_pair(record) or len(record.responses) > 1:
            yield from PAIR.rows(record, losses)
        else:
            yield from super().rows(record, losses)


def _is_pair(record: CandidateSet) -> bool:
    return bool((note_of(record, "prometheus") or {}).get("policies"))


FORMAT = Prometheus()
