"""OpenRLHF: TRL's shapes under its default keys, ``input`` and ``output`` outside pairs, ``margin`` kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.kept import note_of
from rankalign.data.formats.trl import Trl
from rankalign.data.records import CandidateSet, Checker
from rankalign.errors import RecordError

TO_TRL = {"input": "prompt", "output": "completion"}
TO_OPENRLHF = {ours: theirs for theirs, ours in TO_TRL.items()}


@dataclass(frozen=True)
class OpenRLHF(Trl):
    """Pairs are TRL's; ``input`` is a prompt (text or messages), ``output`` its answer, ``label`` a verdict."""

    name = "openrlhf"

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        if row.keys() & {"chosen", "rejected", "messages"} or "input" not in row:
            return super().record(row, check)
        if clash := [key for key in TO_OPENRLHF if key in row]:
            raise check.fail(clash[0], f"stands beside {TO_OPENRLHF[clash[0]]!r}, which means the same")
        try:
            record = super().record({TO_TRL.get(key, key): value for key, value in row.items()}, check)
        except RecordError as error:
            head, dot, tail = error.field.partition(".")
            raise check.fail(TO_OPENRLHF.get(head, head) + dot + tail, error.reason) from None
        record.meta[self.name]["input"] = True
        return record

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The rows TRL would have; alone, a prompt and its answer are ``input`` and ``output``."""
        note = note_of(record, self.name)
        renamed = note is None or note.get("input")
        for row in super().rows(record, losses):
            alone = renamed and row.get("chosen") is None and row.get("messages") is None
            yield {TO_OPENRLHF.get(key, key): value for key, value in row.items()} if alone else row


FORMAT = OpenRLHF()
