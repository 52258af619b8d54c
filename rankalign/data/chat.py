"""What a tokenizer's chat template writes of a conversation: where an answer begins, and what ends its turn.

All is read off the template itself, by what it writes: it is a program of the model's author that may trim contents,
add thoughts, or leave out those of earlier turns. Strings here hold breaks (see :mod:`rankalign.data.special`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data.records import Message
from rankalign.data.special import BREAK, controls
from rankalign.errors import InputError

# Stands for a content where only its surroundings are wanted; no text holds it, and no template trims it.
PROBE = "\U0010fffb"
THOUGHT_END = "</think>"


class Conversation:
    """One conversation as the template writes it; no answer to it is part of it yet.

    Args:
        tokenizer: one with a chat template.
        messages: the prompt. Where the last one is the assistant's, the answer goes on in that very turn.
        allow_special: control tokens spelt in contents are control tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], allow_special: bool = False
    ) -> None:
        self.tokenizer, self.allow_special = tokenizer, allow_special
        self._wholes: dict[str, str] = {}
        self._plain, self.messages = list(messages), [self._guarded(message) for message in messages]

    @property
    def begun(self) -> str | None:
        """The content of an assistant's turn that the prompt has begun, if it has."""
        last = self.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else None

    @functools.cached_property
    def opening(self) -> str:
        """Everything up to where the answer begins: the generation prompt, or the turn that is begun, included.

        Raises:
            InputError: the template refuses the messages, or does not show what it would have to.
        """
        if self.begun is None:
            return self._rendered(self.messages, self._plain, generation=True)
        text, end = self._rendered(self.messages, self._plain), self.after
        if not text.endswith(end):
            raise InputError("the model's chat template writes a begun answer in another way than a whole one")
        return text[: len(text) - len(end)]

    @functools.cached_property
    def _around(self) -> tuple[str, str]:
        text = self._whole(PROBE)
        before, found, after = text.rpartition(PROBE)
        if not found:
            raise InputError("the model's chat template does not show what the assistant says")
        return before, after

    @property
    def before(self) -> str:
        """What stands before an answer in a conversation that is whole, which may be another text than the opening."""
        return self._around[0]

    @property
    def after(self) -> str:
        """What stands behind an answer in a conversation that is whole."""
        return self._around[1]

    @functools.cached_property
    def end(self) -> str:
        """What the template writes behind an answer up to the token that ends the turn; empty if no token does."""
        known = controls(self.tokenizer)
        found = known.pattern.search(self.after) if known.pattern else None
        return self.after[: found.end()] if found else ""

    def whole(self, answer: str) -> str:
        """The conversation with an answer, as ``apply_chat_template`` writes it."""
        if answer not in self._wholes:
            self._wholes[answer] = self._whole(self._safe(answer), answer)
        return self._wholes[answer]

    def written(self, answer: str, before: str) -> str:
        """What the template writes of an answer behind ``before`` (the opening, say), less what ends the turn.

        Raises:
            InputError: it does not stand there whole.
        """
        text, after = self.whole(answer), self.after
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
            raise InputError("the model's chat template writes this answer in another way than others")
        found = text[len(before) : len(text) - len(after)]
        if not _squeezed(found).endswith(_squeezed(self._safe(answer))):  # templates may trim white space
            raise InputError("the model's chat template leaves out a part of this answer (a thought, perhaps)")
        return found

    def hidden(self) -> list[int]:
        """Indices of messages whose contents the template does not show; thoughts of earlier turns may be left out."""
        shown = _squeezed(self.opening)
        contents = [_squeezed(str(message["content"]).rpartition(THOUGHT_END)[2]) for message in self.messages]
        return [index for index, content in enumerate(contents) if content not in shown]

    def _whole(self, answer: str, plain: str | None = None) -> str:
        plain = answer if plain is None else plain
        return self._rendered(_answered(self.messages, answer), _answered(self._plain, plain))

    def _guarded(self, message: Message) -> Message:
        return {**message, "content": self._safe(str(message["content"]))}

    def _safe(self, text: str) -> str:
        return text if self.allow_special else controls(self.tokenizer).broken(text)

    def _rendered(self, messages: list[Message], plain: list[Message], generation: bool = False) -> str:
        text = self._apply(messages, generation)
        # Breaks must only ever be seen again, not read: a template may look for a control token in a content.
        if messages != plain and text.replace(BREAK, "") != self._apply(plain, generation):
            raise InputError(
                f"the model's chat template reads control tokens that a content spells ({_spelt(self, plain)}); "
                "take them out, or keep them with --allow_special_in_text"
            )
        return text

    def _apply(self, messages: list[Message], generation: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False))
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise InputError(f"the model's chat template refuses this prompt: {error}") from error


def _answered(messages: Sequence[Message], answer: str) -> list[Message]:
    """The messages with the answer as a turn of its own, or at the end of the one that is begun."""
    last = messages[-1]
    if last["role"] == "assistant":
        return [*messages[:-1], {**last, "content": f"{last['content']}{answer}"}]
    return [*messages, {"role": "assistant", "content": answer}]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _spelt(conversation: Conversation, messages: Iterable[dict[str, Any]]) -> str:
    known = controls(conversation.tokenizer)
    return ", ".join(sorted({name for message in messages for name in known.spelt(str(message["content"]))}))
