"""Questions to a model behind any engine, each paid for once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankalign.config import build
from rankalign.data.messages import message_text, tool_names
from rankalign.data.records import CandidateSet, Checker, Response, parse_response, response_to_dict
from rankalign.engines import ENGINES, Engine, Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError
from rankalign.storage.code import find
from rankalign.storage.journal import Calls, Remembering, content_digest

Reply = Response | dict[str, Any]
"""An answer, or why there is none: ``{"reason", "tries", ...}``."""


class Asker:
    """One policy that answers questions; replies are kept in a journal and looked for there first.

    Args:
        policy: who answers.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._calls = Calls(name=policy.name)

    @functools.cached_property
    def engine(self) -> Engine:
        """Who writes the replies, built on first use."""
        engine: Engine = find(ENGINES, self.policy.engine)(self.policy)
        return engine

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that a reply depends on beside the question."""
        return policy_settings(self.policy)

    def remember(self, calls: Calls) -> None:
        """Keep replies in ``calls``, and look there before asking; a later run pays for the others alone."""
        self._calls = calls
        if isinstance(self.engine, Remembering):
            self.engine.remember(calls)

    def ask(self, prompts: Sequence[CandidateSet]) -> list[Reply]:
        """A reply to each prompt, or why there is none."""
        replies: dict[int, Reply] = {}
        for batch in self.engine.batches(prompts) if prompts else []:
            asked = [prompts[i] for i in batch]
            answers = self._fetch(asked)
            failed = getattr(self.engine, "failed", {})
            for index, prompt, answer in zip(batch, asked, answers, strict=True):
                replies[index] = answer[0] if answer else failed[prompt.id][0]
        return [replies[index] for index in range(len(prompts))]

    def _fetch(self, asked: list[CandidateSet]) -> list[list[Response]]:
        """One batch of an engine, kept as a whole unless the engine keeps its answers one by one."""
        if isinstance(self.engine, Remembering) or not self._calls:
            return self.engine.generate(asked)
        digests = [content_digest([prompt.prompt, self.settings]) for prompt in asked]
        kept = [self._calls.find(prompt.id, digest) for prompt, digest in zip(asked, digests, strict=True)]
        if all(reply is not None for reply in kept):  # the whole batch or nothing: batch mates change the last bits
            return [[parse_response(Checker("journal", 0), reply, "reply")] for reply in kept]
        answers = self.engine.generate(asked)
        self._calls.keep(
            (prompt.id, digest, response_to_dict(answer[0]))
            for prompt, digest, answer in zip(asked, digests, answers, strict=True)
        )
        return answers


def asked_policy(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any], repair: bool) -> Policy:
    """The policy behind an option ``policy`` or ``writer``.

    Args:
        name: of the scorer.
        options: the keys of a policy of ``rankalign sample``.
        defaults: sampling settings where ``options`` say nothing.
        repair: whether a second turn may be asked for.

    Raises:
        InputError: no such settings, or some that fit no judge.
    """
    if not isinstance(options, Mapping):
        raise InputError("policy: expected a mapping such as {engine: hf, model: default}")
    policy = build(Policy, {"name": name, **({} if "sampling" in options else defaults), **options}, "policy")
    if policy.sampling.n != 1:
        raise InputError("policy: n must be 1; a judge is asked once")
    if policy.template == "alpaca" and repair:
        raise InputError("repair: template 'alpaca' has no second turn; set repair to false or use another template")
    return policy


def question_text(record: CandidateSet, thoughts: bool = False, show: Callable[[str], str] = str) -> str:
    """A prompt as text; who spoke is named where there is more than the user's one message, and tools where there are
    any."""
    prompt, tools = record.prompt, tool_names(record.meta)
    listed = [f"Tools: {show(', '.join(tools))}"] if tools else []
    if isinstance(prompt, str):
        return "\n\n".join([*listed, show(prompt)])
    if len(prompt) == 1 and not listed:
        return show(message_text(prompt[0], thoughts))
    told = [f"{message['role'].capitalize()}: {show(message_text(message, thoughts))}" for message in prompt]
    return "\n\n".join([*listed, *told])
