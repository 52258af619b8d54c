"""RRHF and Wombat training data: ``{"query", "responses", "scores"}``, one prompt with its scored responses a row.

The intermediate files of RRHF's scoring step, ``{"prompt", "response": [...], "scores": [...]}``, are read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import RowFormat, prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import scored_responses
from rankalign.data.records import CandidateSet, Checker, Response

TRAINING, SCORED = ("query", "responses"), ("prompt", "response")


@dataclass(frozen=True)
class Rrhf(RowFormat):
    """Scores are those of judge ``score``; other columns, such as ``origin_scores``, are kept."""

    name = "rrhf"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row; at least two responses, one finite score each."""
        scored = "query" not in row and set(SCORED) <= row.keys()
        query, texts = SCORED if scored else TRAINING
        prompt = check.text(check.need(row, query), query, empty=False)
        answers = check.array(check.need(row, texts), texts, at_least=2)
        scores = check.array(check.need(row, "scores"), "scores")
        if len(scores) != len(answers):
            raise check.fail("scores", f"{len(scores)} scores for {len(answers)} responses")
        pairs = zip(check.texts(answers, texts), check.numbers(scores, "scores"), strict=True)
        responses = [Response(text, scores={"score": score}) for text, score in pairs]
        meta = keep(self.name, {"scored": True} if scored else {}, row, (query, texts, "scores"))
        return CandidateSet("", prompt, responses, meta)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """One row with the responses that have a score; fewer than two of them make none."""
        judge, scored = scored_responses(record, self.judge, losses)
        if not scored:
            return
        lost_details(scored, losses, [judge])
        query, texts = SCORED if (note_of(record, self.name) or {}).get("scored") else TRAINING
        row = {
            query: prompt_text(record.prompt, losses),
            texts: [response.text for response in scored],
            "scores": [response.scores[judge] for response in scored],
        }
        yield complete(row, record, self.name, losses)


FORMAT = Rrhf()
