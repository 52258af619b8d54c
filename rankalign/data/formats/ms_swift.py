"""ms-swift: ``messages`` that end in the chosen answer with the rejected one beside them, or with a ``label``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankalign.data.formats.answered import answer_messages, answered, spelt, talk
from rankalign.data.formats.common import PairFormat
from rankalign.data.formats.kept import keep, note_of
from rankalign.data.formats.ranking import label_column, paired, wanted
from rankalign.data.records import CandidateSet, Checker, Response
from rankalign.data.templates import as_messages

REJECTED = ("rejected_response", "rejected_messages")


@dataclass(frozen=True)
class MsSwift(PairFormat):
    """The rejected answer is a string, one message, or a whole conversation; ``label`` is judge ``label``."""

    name = "ms-swift"
    full = True

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        form = next((key for key in REJECTED if key in row), "")
        whole = check.need(row, "messages")
        if form == "rejected_response" and isinstance(whole, list) and len(whole) > 1:
            # What was rejected takes the place of the last message.
            prompt = check.prompt(whole[:-1], "messages")
            last = check.message(whole[-1], f"messages[{len(whole) - 1}]")
            responses = (
                [answered(check, [last], "messages", policy="completion")] if last["role"] == "assistant" else []
            )
        else:
            prompt, responses = talk(check, whole, "messages", policy="completion")
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
            if turns[: len(prompt)] != prompt:
                raise check.fail(path, "differs from messages before the answer")
            value = turns[len(prompt) :]
        return answered(check, value, path)

    def single_row(self, record: CandidateSet) -> dict[str, Any]:
        """The messages, with ``label``."""
        row: dict[str, Any] = {"messages": as_messages(record.prompt)}
        row["messages"] += [m for response in record.responses for m in answer_messages(response)]
        for response in record.responses:
            row |= label_column(response)
        return row

    def pair_row(self, record: CandidateSet, chosen: Response, rejected: Response) -> dict[str, Any]:
        """The answer that was chosen ends the messages; the other stands in the form it came in."""
        prompt = as_messages(record.prompt)
        row: dict[str, Any] = {"messages": [*prompt, *answer_messages(chosen)]}
        form = (note_of(record, self.name) or {}).get("form")
        if form == "rejected_messages":
            row[form] = [*prompt, *answer_messages(rejected)]
        elif len(answer_messages(chosen)) > 1:
            row["rejected_messages"] = [*prompt, *answer_messages(rejected)]
        else:
            row["rejected_response"] = spelt(rejected, text=form != "list" and not rejected.meta.get("message"))
        return row


FORMAT = MsSwift()
