"""Answers that are already in the data: human ones, those of a data set, or another run's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.data.templates import as_messages
from rankalign.engines import Policy
from rankalign.errors import InputError

BATCH = 64
"""Prompts handed over at once; nothing is computed, so the number means little."""


class ReplayEngine:
    """Takes responses from the prompt file itself, or from the records of the same ids in ``policy.file``.

    ``policy.only`` picks the responses of one policy. They are renamed to ``policy.name``; the name they had stands
    in ``meta["replayed_from"]`` where it differs. Text, tokens, counts and scores stay as they are.

    Args:
        policy: ``file`` and ``only`` say what to take; sampling settings mean nothing here.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @functools.cached_property
    def _stored(self) -> dict[str, CandidateSet]:
        return {record.id: record for record in records.read(self.policy.file)}

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Indices in the order of the prompts.

        Raises:
            InputError: prompts without a response to take; all are counted, the first named.
        """
        bare = [prompt.id for prompt in prompts if not self._taken(prompt)]
        if bare:
            raise InputError(f"policy {self.policy.name!r}: {self._lack(bare, len(prompts))}")
        return [list(range(i, min(i + BATCH, len(prompts)))) for i in range(0, len(prompts), BATCH)]

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """The responses of each prompt in their order in the data."""
        self.batches(prompts)
        return [[self._renamed(response) for response in self._taken(prompt)] for prompt in prompts]

    def _taken(self, prompt: CandidateSet) -> list[Response]:
        source = self._stored.get(prompt.id) if self.policy.file else prompt
        if source is None:
            return []
        if as_messages(source.prompt) != as_messages(prompt.prompt):
            raise InputError(
                f"policy {self.policy.name!r}: {self.policy.file} has another prompt under the id {prompt.id!r}"
            )
        return [r for r in source.responses if not self.policy.only or r.policy == self.policy.only]

    def _lack(self, bare: Sequence[str], total: int) -> str:
        what = f"response of policy {self.policy.only!r}" if self.policy.only else "response"
        where = self.policy.file or "the prompt file"
        named = ", ".join(map(repr, bare[:5])) + (", ..." if len(bare) > 5 else "")
        return f"{where} holds no {what} for {len(bare)} of {total} prompts ({named})"

    def _renamed(self, response: Response) -> Response:
        name = self.policy.name
        meta = response.meta if response.policy == name else {**response.meta, "replayed_from": response.policy}
        return dataclasses.replace(response, policy=name, meta=meta)
