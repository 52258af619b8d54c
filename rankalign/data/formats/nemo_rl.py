"""NeMo-RL preference data: ``{"context": messages, "completions": [{"rank", "completion": [message]}]}``, 0 is best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answered import answer_messages, answered
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, lost_sizes
from rankalign.data.formats.ranking import scored_responses
from rankalign.data.records import CandidateSet, Checker, Response
from rankalign.data.templates import as_messages


@dataclass(frozen=True)
class NemoRL(RowFormat):
    """The score of judge ``rank`` is minus the rank, so that higher is better; equal ranks are ties."""

    name = "nemo-rl"
    full = True

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row; each completion is a list of messages, the assistant's first and last."""
        prompt = check.prompt(check.need(row, "context"), "context")
        if isinstance(prompt, str):
            raise check.fail("context", "expected a list of messages, found a string")
        entries = check.array(check.need(row, "completions"), "completions", at_least=1)
        responses = [_completion(check, entry, f"completions[{index}]") for index, entry in enumerate(entries)]
        return CandidateSet("", prompt, responses, keep(self.name, {}, row, ("context", "completions")))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """One row with the responses that have a score, ranked 0, 1, ... where they carry no ranks."""
        judge, scored = scored_responses(record, self.judge, losses, at_least=1)
        if not scored:
            return
        lost_details(scored, losses, [judge], meta=False, messages=False)
        lost_sizes(scored, judge, losses, kept=("rank",))
        ranks = _ranks([response.scores[judge] or 0 for response in scored], judge)
        entries = [_entry(response, rank) for response, rank in zip(scored, ranks, strict=True)]
        row = {"context": as_messages(record.prompt), "completions": entries}
        yield complete(row, record, self.name, losses)


def _completion(check: Checker, entry: Any, path: str) -> Response:
    check.mapping(entry, path)
    rank = check.number(check.need(entry, "rank", path), f"{path}.rank")
    completion = check.need(entry, "completion", path)
    if isinstance(completion, str):
        raise check.fail(f"{path}.completion", "expected a list of messages, found a string")
    response = answered(check, completion, f"{path}.completion", scores={"rank": -rank})
    if further := {key: value for key, value in entry.items() if key not in ("rank", "completion")}:
        response.meta["nemo-rl"] = further
    return response


def _ranks(scores: list[float], judge: str) -> list[float]:
    """Ranks as they came, or dense ranks from 0; ties share one."""
    if judge == "rank":
        return [-score for score in scores]
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def _entry(response: Response, rank: float) -> dict[str, Any]:
    return {"rank": rank, "completion": answer_messages(response), **response.meta.get("nemo-rl", {})}


FORMAT = NemoRL()
