"""Stanford Alpaca instruction data: ``{"instruction", "input", "output"}``, further columns kept.

The prompt is one user message, instruction and input joined by a blank line; ``meta["alpaca"]`` keeps the two apart for
the ``alpaca`` template and for writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import RowFormat, instruction_text, prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import best, pick_judge
from rankalign.data.records import CandidateSet, Checker, Message, Response

COLUMNS = ("instruction", "input", "output")


def read_instruction(row: dict[str, Any], check: Checker) -> tuple[list[Message], dict[str, str]]:
    """``instruction`` and, where there is one, ``input``: the prompt and the two apart."""
    parts = {"instruction": check.text(check.need(row, "instruction"), "instruction")}
    if "input" in row:
        parts["input"] = check.text(row["input"], "input")
    content = instruction_text(parts["instruction"], parts.get("input", ""))
    return [{"role": "user", "content": check.text(content, "instruction", empty=False)}], parts


def write_instruction(record: CandidateSet, name: str, losses: Losses) -> dict[str, str]:
    """``instruction`` and ``input`` of a record: as they came while they still spell its prompt, else the prompt."""
    for key in (name, "alpaca"):  # readers of other formats keep the two apart under the second name
        parts = {k: v for k, v in (note_of(record, key) or {}).items() if k in COLUMNS[:2]}
        content = instruction_text(parts.get("instruction", ""), parts.get("input", ""))
        if parts and record.prompt == [{"role": "user", "content": content}]:
            return parts
    return {"instruction": prompt_text(record.prompt, losses), "input": ""}


@dataclass(frozen=True)
class Alpaca(RowFormat):
    """The output is a response of policy ``output``; rows without one are prompts."""

    name = "alpaca"
    reads = frozenset({"text"})  # the same row, put into Stanford's template

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row; ``input`` and ``output`` may be missing."""
        prompt, note = read_instruction(row, check)
        responses = [Response(check.text(row["output"], "output"), policy="output")] if "output" in row else []
        return CandidateSet("", prompt, responses, keep(self.name, note, row, COLUMNS))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """One row with the best response."""
        row: dict[str, Any] = dict(write_instruction(record, self.name, losses))
        if record.responses or note_of(record, self.name) is None:
            judge = pick_judge(record, self.judge)
            response = best(record, judge, losses)
            if response is None:
                return
            lost_details([response], losses, policy=response.policy != "output")
            row["output"] = response.text
        yield complete(row, record, self.name, losses)


FORMAT = Alpaca()
