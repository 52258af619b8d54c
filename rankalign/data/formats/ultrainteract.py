"""UltraInteract's pairs: a step of a tree, ``trajectory`` of turns so far, ``chosen`` and ``rejected`` next actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankalign.data.formats.common import PairFormat
from rankalign.data.formats.kept import keep, note_of
from rankalign.data.formats.ranking import paired
from rankalign.data.records import CandidateSet, Checker, Message, Response
from rankalign.data.templates import as_messages

ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "human": "user",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class UltraInteract(PairFormat):
    """The prompt is the way from the root to this step; ``parent_id`` stays in ``meta``."""

    name = "ultrainteract"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        turns = check.array(check.need(row, "trajectory"), "trajectory", at_least=1)
        messages = [_message(turn, f"trajectory[{index}]", check) for index, turn in enumerate(turns)]
        texts = [check.text(check.need(row, side), side) for side in ("chosen", "rejected")]
        note = {"speakers": [turn["from"] for turn in turns]}
        meta = keep(self.name, note, row, ("trajectory", "chosen", "rejected"))
        return CandidateSet("", check.prompt(messages, "trajectory"), paired(*map(Response, texts)), meta)

    def pair_row(self, record: CandidateSet, chosen: Response, rejected: Response) -> dict[str, Any]:
        """A row of two of the answers."""
        return {**self.single_row(record), "chosen": chosen.text, "rejected": rejected.text}

    def single_row(self, record: CandidateSet) -> dict[str, Any]:
        """The turns alone."""
        messages = as_messages(record.prompt)
        speakers = (note_of(record, self.name) or {}).get("speakers", [])
        names = speakers if len(speakers) == len(messages) else [message["role"] for message in messages]
        return {"trajectory": [{"from": n, "value": m["content"]} for n, m in zip(names, messages, strict=True)]}


def _message(turn: Any, path: str, check: Checker) -> Message:
    check.mapping(turn, path)
    speaker = check.need(turn, "from", path)
    if speaker not in ROLES:
        raise check.fail(f"{path}.from", f"unknown speaker {speaker!r} (one of {', '.join(ROLES)})")
    if further := turn.keys() - {"from", "value"}:
        raise check.fail(f"{path}.{min(further)}", "is not read")
    return {"role": ROLES[speaker], "content": check.text(check.need(turn, "value", path), f"{path}.value")}


FORMAT = UltraInteract()
