"""Criteria written by a model for records that have none: asked for once, kept in the journal and in the record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.records import CandidateSet, Message, Response
from rankalign.errors import InputError
from rankalign.scorers.asking import Asker, Reply, asked_policy
from rankalign.scorers.criteria import AGAIN, WRITE, WRITER, WRITTEN, read_written, writing
from rankalign.scorers.hardening import GUARD, fence, harden
from rankalign.storage.journal import Calls, content_digest

DEFAULTS = {"temperature": 0.0, "max_new_tokens": 1024}
QUOTED = 4000
"""Most characters of its own text that a writer is shown when it is asked again."""


@dataclass
class Written:
    """What a writer made of one record.

    Attributes:
        prompt: what it was asked.
        criteria: as records keep them; empty where none could be read.
        text: what it wrote.
        repair: what it wrote when asked again; None where it was not.
        reason: why its criteria cannot be used; empty where they can.
        failed: why there is no text, and after how many tries.
    """

    prompt: CandidateSet
    criteria: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    repair: str | None = None
    reason: str = ""
    failed: dict[str, Any] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Numbers that can be added up over records."""
        return {"rubrics_written": int(bool(self.criteria)), "rubrics_unread": int(not self.criteria)}

    def told(self) -> dict[str, Any]:
        """What is kept of it in the record."""
        kept = {"text": self.text, "repair": self.repair, "reason": self.reason or None, "failed": self.failed}
        return {key: value for key, value in kept.items() if value is not None}


class RubricWriter:
    """Asks a model for the criteria of requests, one call a request and one more where nothing could be read.

    Args:
        name: of the scorer.
        policy: who writes.
        mode: ``rubric`` or ``checklist``.
        hardened: fence the request and break what imitates orders in it.
        repair: ask once more.

    Raises:
        InputError: an option is wrong, or the mode has no criteria.
    """

    def __init__(self, name: str, policy: Mapping[str, Any], mode: str, hardened: bool, repair: bool) -> None:
        if mode not in WRITE:
            raise InputError(f"writer: mode {mode} has no criteria to write; it is for rubric and checklist")
        self.name, self.mode, self.hardened, self.repair = f"{name}/writer", mode, hardened, repair
        try:
            self._writer = Asker(asked_policy(self.name, policy, DEFAULTS, repair))
        except InputError as error:
            raise InputError(f"writer: {error}") from None

    def remember(self, calls: Calls) -> None:
        """Keep replies in the journal of ``calls``, under a name of their own."""
        self._writer.remember(dataclasses.replace(calls, name=self.name))

    def fingerprint(self) -> dict[str, Any]:
        """Policy and words."""
        words = [WRITER, WRITE[self.mode], WRITTEN, AGAIN, GUARD if self.hardened else ""]
        return {"policy": self._writer.settings, "words_sha256": hashlib.sha256(json.dumps(words).encode()).hexdigest()}

    def show(self, text: str) -> str:
        """A part of a request as it is shown."""
        return harden(text)[0] if self.hardened else text

    def write(self, sets: Sequence[CandidateSet], questions: Sequence[str]) -> list[Written]:
        """Criteria for each record.

        Args:
            sets: records.
            questions: their requests as texts, shown by :meth:`show`.
        """
        asked = [Written(self._ask(record, text)) for record, text in zip(sets, questions, strict=True)]
        for written, reply in zip(asked, self._writer.ask([each.prompt for each in asked]), strict=True):
            self._take(written, reply)
        again = [each for each in asked if each.reason and each.failed is None] if self.repair else []
        for written, reply in zip(again, self._writer.ask([_again(each) for each in again]), strict=True):
            written.repair = reply.text if isinstance(reply, Response) else ""
            self._take(written, reply, again=True)
        return asked

    def _ask(self, record: CandidateSet, question: str) -> CandidateSet:
        system = WRITER
        if self.hardened:
            nonce = content_digest([record.id, self.name, question])[:12]
            system, question = f"{system}\n\n{GUARD.format(nonce=nonce)}", fence("request", question, nonce)
        messages: list[Message] = [
            {"role": "system", "content": system},
            {"role": "user", "content": writing(self.mode, question)},
        ]
        return CandidateSet(f"{record.id}/{self.name}", messages, meta={"record": record.id})

    def _take(self, written: Written, reply: Reply, again: bool = False) -> None:
        if not isinstance(reply, Response):
            written.failed = {key: reply[key] for key in ("reason", "tries")}
            return
        if not again:
            written.text = reply.text
        try:
            if not reply.finished:
                raise InputError("the token limit cut it")
            written.criteria, written.reason = read_written(reply.text, self.mode), ""
        except InputError as error:
            written.reason = str(error)


def _again(written: Written) -> CandidateSet:
    said = {"role": "assistant", "content": written.text[-QUOTED:].strip() or "..."}
    request = {"role": "user", "content": AGAIN.format(reason=written.reason)}
    asked = written.prompt
    return CandidateSet(f"{asked.id}/repair", [*asked.prompt, said, request], meta=asked.meta)
