"""GPT-4-LLM comparisons, as Wombat used them.

Three shapes: ``{"user_input", "completion_a", "completion_b"}`` with the first ranked higher (scores 2 and 1),
``{"user_input", "responses_and_scores": [{"response", "source", "score"}]}``, and
``{"instruction", "input", "output": [better, worse, ...]}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.alpaca import read_instruction, write_instruction
from rankalign.data.formats.common import RowFormat, prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import scored_responses
from rankalign.data.records import CandidateSet, Checker, Response

PAIR, LIST = ("completion_a", "completion_b"), "responses_and_scores"


@dataclass(frozen=True)
class GPT4Compare(RowFormat):
    """Scores are those of judge ``score``; an order of K answers gives K, ..., 2, 1."""

    name = "gpt4-compare"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of any of the shapes."""
        if "instruction" in row:
            prompt, parts = read_instruction(row, check)
            texts = check.array(check.need(row, "output"), "output", at_least=2)
            responses = _ordered([check.text(text, f"output[{i}]") for i, text in enumerate(texts)])
            meta = keep(self.name, parts, row, ("instruction", "input", "output"))
            return CandidateSet("", prompt, responses, meta)
        asked = check.text(check.need(row, "user_input"), "user_input", empty=False)
        used = (LIST,) if LIST in row else PAIR
        if LIST in row:
            entries = check.array(row[LIST], LIST, at_least=2)
            responses = [_scored(check, entry, f"{LIST}[{i}]") for i, entry in enumerate(entries)]
        else:
            responses = _ordered([check.text(check.need(row, key), key) for key in PAIR])
        meta = keep(self.name, {}, row, ("user_input", *used))
        return CandidateSet("", [{"role": "user", "content": asked}], responses, meta)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """An order or a pair in columns where that says all, else a list with scores."""
        judge, scored = scored_responses(record, self.judge, losses)
        if not scored:
            return
        note, ranking = note_of(record, self.name), [response.scores[judge] or 0 for response in scored]
        ordered = note is not None and ranking == list(range(len(scored), 0, -1)) and _nameless(scored)
        row: dict[str, Any]
        if note is not None and "instruction" in note and ordered:
            row = {**write_instruction(record, self.name, losses), "output": [r.text for r in scored]}
        else:
            row = {"user_input": prompt_text(record.prompt, losses if note is None else Losses())}
        in_columns = len(scored) == 2 and len(set(ranking)) == 2 and (ordered or note is None)
        if in_columns and "output" not in row:
            scored.sort(key=lambda response: -(response.scores[judge] or 0))
            row |= {key: response.text for key, response in zip(PAIR, scored, strict=True)}
        elif "output" not in row:
            row[LIST] = [_entry(response, judge) for response in scored]
        listed = LIST in row
        lost_details(scored, losses, [judge], policy=not listed, meta=not listed)
        yield complete(row, record, self.name, losses)


def _nameless(responses: list[Response]) -> bool:
    return all(response.policy == "unknown" for response in responses)


def _ordered(texts: list[str]) -> list[Response]:
    return [Response(text, scores={"score": len(texts) - rank}) for rank, text in enumerate(texts)]


def _scored(check: Checker, entry: Any, path: str) -> Response:
    check.mapping(entry, path)
    text = check.text(check.need(entry, "response", path), f"{path}.response")
    score = check.number(check.need(entry, "score", path), f"{path}.score")
    policy = check.text(check.need(entry, "source", path), f"{path}.source", empty=False)
    further = {key: value for key, value in entry.items() if key not in ("response", "score", "source")}
    return Response(text, policy=policy, scores={"score": score}, meta=further)


def _entry(response: Response, judge: str) -> dict[str, Any]:
    return {"response": response.text, "source": response.policy, "score": response.scores[judge], **response.meta}


FORMAT = GPT4Compare()
