"""ms-swift: ``messages`` that end in the chosen answer with the rejected one beside them, or with a ``label``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankalign.data.formats.common import (
    PairFormat,
    answered,
    as_message,
    keep,
    label_column,
    note_of,
    paired,
    wanted,
)
from rankalign.data.records import CandidateSet, Checker, Prompt, Response
from rankalign.data.templates import as_messages

REJECTED = ("rejected_response", "rejected_messages")


@dataclass(frozen=True)
class MsSwift(PairFormat):
    """The rejected answer is a string, one message, or a whole conversation; ``label`` is judge ``label``."""

    name = "ms-swift"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        messages = check.prompt(check.need(row, "messages"), "messages")
        if isinstance(messages, str):
            raise check.fail("messages", "expected a list of messages, found a string")
        prompt: Prompt = messages
        responses: list[Response] = []
        if messages[-1]["role"] == "assistant":
            prompt = check.prompt(messages[:-1], "messages")
            responses = [answered(check, messages[-1:], "messages", policy="completion")]
        form = next((key for key in REJECTED if key in row), "")
        note = {"form": form} if form else {}
        if form:
            if not responses:
                raise check.fail("messages", "do not end with the answer that was chosen")
            responses = paired(responses[0], self._rejected(row[form], form, prompt, check))
            if isinstance(row[form], list) and form == "rejected_response":
                note["form"] = "list"
        elif "label" in row:
            if not responses:
                raise check.fail("label", "stands beside no answer: messages end with another turn")
            responses[0].scores = {"label": wanted(check, row["label"], "label")}
        used = ("messages", form) if form else ("messages", "label")
        return CandidateSet("", prompt, responses, keep(self.name, note, row, used))

    def _rejected(self, value: Any, path: str, prompt: Any, check: Checker) -> Response:
        if path == "rejected_messages":
            turns = check.array(value, path, at_least=2)
            if turns[:-1] != prompt:
                raise check.fail(path, "differs from messages before the last one")
            value = turns[-1:]
        return answered(check, value, path)

    def single_row(self, record: CandidateSet) -> dict[str, Any]:
        """The messages, with ``label``."""
        row: dict[str, Any] = {"messages": as_messages(record.prompt) + [as_message(r) for r in record.responses]}
        for response in record.responses:
            row |= label_column(response)
        return row

    def pair_row(self, record: CandidateSet, chosen: Response, rejected: Response) -> dict[str, Any]:
        """The answer that was chosen ends the messages; the other stands in the form it came in."""
        prompt = as_messages(record.prompt)
        row: dict[str, Any] = {"messages": [*prompt, as_message(chosen)]}
        form = (note_of(record, self.name) or {}).get("form")
        if form == "rejected_messages":
            row[form] = [*prompt, as_message(rejected)]
        elif form == "list" or rejected.meta.get("message"):
            row["rejected_response"] = [as_message(rejected)]
        else:
            row["rejected_response"] = rejected.text
        return row


FORMAT = MsSwift()
