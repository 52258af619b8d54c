"""Whole texts with scores, ``{"text": [...], "score": [...]}``, as DSP has them: what all texts share is the prompt.

One text with a score, ``{"text": "...", "score": 1.5}``, as sentiment data has them, is cut as trlX cuts reviews: its
first four words are the prompt, and what follows is the response.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Dropped, RowFormat
from rankalign.data.formats.hh import write_dialogue
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import scored_responses
from rankalign.data.formats.trl import split_shared
from rankalign.data.records import CandidateSet, Checker, Response

OPENING = 4
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class TextScore(RowFormat):
    """The better text need not stand first, and equal scores are ties; scores are those of judge ``score``."""

    name = "text-score"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row; the prompt ends at the last mark of an assistant's turn that all texts share."""
        if isinstance(row.get("text"), str):
            return self._read_single(row, check)
        texts = check.array(check.need(row, "text"), "text", at_least=2)
        scores = check.array(check.need(row, "score"), "score")
        if len(scores) != len(texts):
            raise check.fail("score", f"{len(scores)} scores for {len(texts)} texts")
        for index, text in enumerate(texts):
            check.text(text, f"text[{index}]", empty=False)
        cut = min(split_shared(texts[0], text) for text in texts[1:])
        if not cut:
            raise check.fail("text", "the texts share no beginning that could be their prompt")
        responses = [
            Response(text[cut:], scores={"score": check.number(score, f"score[{index}]")})
            for index, (text, score) in enumerate(zip(texts, scores, strict=True))
        ]
        return CandidateSet("", texts[0][:cut], responses, keep(self.name, {}, row, ("text", "score")))

    def _read_single(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        text = check.text(row["text"], "text", empty=False)
        score = check.number(check.need(row, "score"), "score")
        cut = _opening(text)
        if not cut:
            raise Dropped(check.file, check.line, "", "texts of a single word")
        responses = [Response(text[cut:], scores={"score": score})]
        return CandidateSet("", text[:cut], responses, keep(self.name, {"single": True}, row, ("text", "score")))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """One row with the responses that have a score."""
        single = len(record.responses) == 1 and (note_of(record, self.name) or {}).get("single", False)
        judge, scored = scored_responses(record, self.judge, losses, at_least=1 if single else 2)
        if not scored:
            return
        lost_details(scored, losses, [judge])
        own = note_of(record, self.name) is not None and isinstance(record.prompt, str)
        head = record.prompt if own else f"{write_dialogue(record, losses)} "
        row: dict[str, Any] = {"text": [f"{head}{r.text}" for r in scored], "score": [r.scores[judge] for r in scored]}
        if single:
            row = {key: value for key, (value,) in row.items()}
        yield complete(row, record, self.name, losses)


def _opening(text: str) -> int:
    """Where the first four words end, or as many as leave one word; 0 where there is but one."""
    ends = [word.end() for word in _WORD.finditer(text)]
    return ends[min(OPENING, len(ends) - 1) - 1] if len(ends) > 1 else 0


FORMAT = TextScore()
