r"""Anthropic HH dialogues, ``\n\nHuman: ...\n\nAssistant: ...``, in ``chosen`` and ``rejected``, whole or cut.

Cut at a ``prompt`` column they have the shape of rm-static and full-hh-rlhf. The prompt is everything up to the last
``Assistant:``, as messages, so that a chat template can be put around it; the ``hh`` template gives the text back. What
that template would not give back to the letter (a missing blank, for one) waits in ``meta["hh"]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Dropped, RowFormat, dialogue_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import paired
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Message, Response

MARK = "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}
INTO_NEXT = "answers that go on into another turn"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_dialogue(text: str) -> list[Message]:
    """The turns of a dialogue that ends with ``Assistant:``, the blank behind each name taken off."""
    lead, *turns = _TURN.split(text)
    messages = [{"role": "system", "content": lead}] if lead.strip() else []
    for name, content in zip(turns[:-2:2], turns[1:-2:2], strict=True):  # the last turn is the answer's
        messages.append({"role": ROLES[name], "content": content.removeprefix(" ")})
    return messages


def split_reply(check: Checker, text: str, path: str) -> tuple[str, str]:
    """A dialogue cut behind its last ``Assistant:``."""
    head, mark, reply = text.rpartition(MARK)
    if not mark:
        raise check.fail(path, "has no 'Assistant:' turn")
    if not reply.strip():
        raise check.fail(path, "its last answer is empty")
    return head + mark, reply


def write_dialogue(record: CandidateSet, losses: Losses) -> str:
    """The prompt as text that ends with ``Assistant:``; results of tools are left out and counted."""
    text = dialogue_text(record.prompt, losses)
    return text if text.endswith(MARK) else text + MARK


@dataclass(frozen=True)
class HH(RowFormat):
    """``chosen`` and ``rejected`` are scored 1 and 0 by judge ``preference``."""

    name = "hh"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row; the two dialogues must agree up to their last answer."""
        chosen, rejected = (check.text(check.need(row, key), key) for key in ("chosen", "rejected"))
        note: dict[str, Any] = {}
        if "prompt" in row:
            head, note = check.text(row["prompt"], "prompt", empty=False), {"prompt": True}
            if not head.endswith(MARK):
                raise check.fail("prompt", "does not end with '\\n\\nAssistant:'")
        else:
            head, chosen = split_reply(check, chosen, "chosen")
            other, rejected = split_reply(check, rejected, "rejected")
            if head != other:
                raise check.fail("rejected", "differs from chosen before the last 'Assistant:'")
        if any(_TURN.search(side) for side in (chosen, rejected)):
            raise Dropped(check.file, check.line, "", INTO_NEXT)  # it would teach the model to speak for the person
        record = CandidateSet("", read_dialogue(head), paired(_reply(chosen), _reply(rejected)))
        check.prompt(record.prompt)
        if write_dialogue(record, Losses()) != head:
            note["head"] = head
        record.meta = keep(self.name, note, row, ("prompt", "chosen", "rejected"))
        return record

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The pair as it came, or the strict pairs of a ranked list."""
        if self.is_pair(record):
            lost_details(record.responses, losses, [PREFERENCE], policy=False, meta=False)
            chosen, rejected = record.responses
            yield complete(self._row(record, chosen, rejected, losses), record, self.name, losses)
        else:
            yield from self.pair_rows(record, losses, lambda better, worse, _: self._row(record, better, worse, losses))

    def _row(self, record: CandidateSet, chosen: Response, rejected: Response, losses: Losses) -> dict[str, Any]:
        note = note_of(record, self.name) or {}
        head = note.get("head", "")
        if not head or read_dialogue(head) != record.prompt:
            head = write_dialogue(record, losses)
        if note.get("prompt"):
            return {"prompt": head, "chosen": _spell(chosen), "rejected": _spell(rejected)}
        return {"chosen": head + _spell(chosen), "rejected": head + _spell(rejected)}


def _reply(text: str) -> Response:
    return Response(text.removeprefix(" "), meta={} if text.startswith(" ") else {"blank": False})


def _spell(response: Response) -> str:
    return response.text if response.meta.get("blank") is False else f" {response.text}"


FORMAT = HH()
