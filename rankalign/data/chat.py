"""What a tokenizer's chat template writes of a conversation: where an answer begins, and what ends its turn.

All is read off the template itself, by what it writes: it is a program of the model's author that may trim contents,
add thoughts, or leave out those of earlier turns. Strings here hold breaks (see :mod:`rankalign.data.special`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data.dialect import Dialect, Extras, dialect_of
from rankalign.data.messages import SHOWN_FIELDS, THOUGHT_FIELDS, Message, is_begun, said, text_of, with_text
from rankalign.data.special import BREAK, controls
from rankalign.errors import InputError

# Stands for a content where only its surroundings are wanted; no text holds it, and no template trims it.
PROBE = "\U0010fffb"
THOUGHT_END = "</think>"
NO_EXTRAS = Extras()

# An answer: its text, or its messages where a text does not say all of it.
Said = str | tuple[Message, ...]


class Conversation:
    """One conversation as the template writes it; no answer to it is part of it yet.

    Args:
        tokenizer: one with a chat template.
        messages: the prompt. Where the last one is the assistant's, the answer goes on in that very turn; a message
            that calls tools is whole.
        allow_special: control tokens spelt in contents are control tokens.
        extras: tools, documents and keyword arguments of the record.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        allow_special: bool = False,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        self.tokenizer, self.allow_special = tokenizer, allow_special
        self.dialect: Dialect = dialect_of(tokenizer)
        self._wholes: dict[str, str] = {}
        self._plain = self.dialect.read(messages)
        self._plain_extras, self._extras = extras, extras.changed(self._safe_all)
        self.messages = [self._guarded(message) for message in self._plain]

    @property
    def begun(self) -> str | None:
        """The content of an assistant's turn that the prompt has begun, if it has."""
        return text_of(self.messages[-1]) if is_begun(self.messages) else None

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

    def shared(self, opened: str, wholes: Sequence[str]) -> str | None:
        """The part of an opening that whole conversations have in common with it, where it parts from one of them.

        A generation prompt may open what the template does not write before every answer: an empty thought, a blank.
        None where more than that differs, a control token for one.
        """
        same = common(opened, *wholes)
        last = controls(self.tokenizer).last(same)
        name = next(iter(controls(self.tokenizer).spelt(same[last:])), "")
        # Back to the end of a control token or of a line: letters that happen to be the same are no part of it.
        kept = max(last + len(name), same.rfind("\n", last) + 1)
        return None if controls(self.tokenizer).spelt(opened[kept:]) else same[:kept]

    def closing(self, answer: Said) -> tuple[str, str]:
        """What stands behind an answer, and the part of it that ends the turn: :attr:`after` and :attr:`end`, or what a
        call of a tool is ended with."""
        text = self.whole(answer)
        if isinstance(answer, str) or text.endswith(self.after):
            return self.after, self.end
        return self.turn_end(text)

    def turn_end(self, text: str) -> tuple[str, str]:
        """The same read off the end of a text, whose last control token it is if only blanks follow."""
        start = controls(self.tokenizer).last(text)
        found = controls(self.tokenizer).spelt(text[start:])
        if not found or text[start + len(found[0]) :].strip():
            return "", ""
        head = len(text[:start].rstrip("\n"))  # a line break before the token belongs to the ending
        return text[head:], text[head : start + len(found[0])]

    def whole(self, answer: Said) -> str:
        """The conversation with an answer, as ``apply_chat_template`` writes it."""
        key = answer if isinstance(answer, str) else json.dumps(answer)
        # A text cannot begin with the sign that the key of messages begins with: breaks are taken out of texts.
        key = key if isinstance(answer, str) else BREAK + key
        if key not in self._wholes:
            safe = self._safe(answer) if isinstance(answer, str) else self._safe_said(answer)
            self._wholes[key] = self._whole(safe, answer)
        return self._wholes[key]

    def written(self, answer: Said, before: str) -> str:
        """What the template writes of an answer behind ``before`` (the opening, say), less what ends the turn.

        Raises:
            InputError: it does not stand there whole.
        """
        text, (after, _) = self.whole(answer), self.closing(answer)
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
            raise InputError("the model's chat template writes this answer in another way than others")
        found = text[len(before) : len(text) - len(after)]
        if isinstance(answer, str):
            if not _squeezed(found).endswith(_squeezed(self._safe(answer))):  # templates may trim white space
                raise InputError("the model's chat template leaves out a part of this answer (a thought, perhaps)")
            return found
        if hidden := self.hidden_of(answer):
            raise InputError(
                f"the model's chat template does not show {', '.join(hidden)} of this answer"
                + ("; --thoughts drop leaves thoughts out" if any("thought" in what for what in hidden) else "")
            )
        return found

    def hidden_of(self, answer: Sequence[Message]) -> list[str]:
        """What an answer in messages says and the template does not show: taken away, the text stays the same.

        Names and ids of calls are left to the template: most have no place for them.
        """
        text, found = self.whole(tuple(answer)), []
        for place, message in enumerate(answer):
            held = said(message, ("tool_calls", "tool_plan", "refusal"))
            changes = {name: {k: v for k, v in message.items() if k != name} for name in held}
            if thought := said(message, THOUGHT_FIELDS):
                changes["its thought"] = {k: v for k, v in message.items() if k not in thought}
            if text_of(message).strip():
                changes["content"] = with_text(message, "")
            for name, changed in changes.items():
                if self._try([*answer[:place], changed, *answer[place + 1 :]]) == text:
                    found.append(name)
            content = _squeezed(self._safe(text_of(message)))
            if message["role"] == "assistant" and "content" not in found and not _shows(_squeezed(text), content):
                found.append("a thought in the content")
        return list(dict.fromkeys(found))

    def hidden(self) -> list[int]:
        """Indices of messages whose contents the template does not show; thoughts of earlier turns may be left out."""
        shown = _squeezed(self.opening)
        contents = [_squeezed(text_of(message).rpartition(THOUGHT_END)[2]) for message in self.messages]
        return [index for index, content in enumerate(contents) if not _shows(shown, content)]

    def unshown(self) -> list[str]:
        """What the prompt says beside roles and contents and the template does not show: ``tools``, ``tool_calls``, ...

        Thoughts of earlier turns are the template's to leave out. A keyword argument counts as shown where the template
        mentions it.
        """
        found = [name for name in self._plain_extras.options if not self.dialect.mentions(name)]
        plain = self._plain_extras
        bare = {"tools": plain.without("tools"), "documents": plain.without("documents")}
        for name in said({"tools": plain.tools, "documents": plain.documents}, bare):
            if self._apply(self._plain, True, bare[name]) == self._apply(self._plain, True, plain):
                found.append(name)
        for place, message in enumerate(self._plain):
            for name in said(message, (f for f in SHOWN_FIELDS if f not in THOUGHT_FIELDS)):
                changed = [*self._plain]
                changed[place] = {key: value for key, value in message.items() if key != name}
                if self._tried(changed, True) == self._apply(self._plain, True, plain):
                    found.append(name)
        return list(dict.fromkeys(found))

    def follow(self, answer: Sequence[Message], count: int, generation: bool = False) -> str:
        """The conversation with the first ``count`` messages of an answer, and what opens the next where asked for."""
        plain = _answered(self._plain, self.dialect.read(answer[:count])) if count else self._plain
        safe = _answered(self.messages, self._safe_said(tuple(answer[:count]))) if count else self.messages
        return self._rendered(safe, plain, generation)

    def spans(self, answer: Sequence[Message]) -> list[tuple[int, int]] | None:
        """Where in :meth:`whole` the template says that the assistant writes; None where it has no marks for that."""
        if not self.dialect.marks_generation:
            return None
        messages = _answered(self.messages, self._safe_said(tuple(answer)))
        text, spans = self.dialect.tracked(messages, self._extras)
        return spans if text == self.whole(tuple(answer)) else None

    def _whole(self, answer: Said, plain: Said | None = None) -> str:
        told = answer if plain is None else plain
        told = told if isinstance(told, str) else tuple(self.dialect.read(told))
        return self._rendered(_answered(self.messages, answer), _answered(self._plain, told))

    def _try(self, answer: Sequence[Message]) -> str | None:
        """The whole of a changed answer; None where the template refuses it."""
        return self._tried(_answered(self.messages, self._safe_said(tuple(answer))), False, self._extras)

    def _tried(self, messages: list[Message], generation: bool, extras: Extras | None = None) -> str | None:
        try:
            return self._apply(messages, generation, self._plain_extras if extras is None else extras)
        except InputError:
            return None

    def _guarded(self, message: Message) -> Message:
        return {key: value if key == "role" else self._safe_all(value) for key, value in message.items()}

    def _safe_said(self, answer: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(self._guarded(message) for message in self.dialect.read(answer))

    def _safe_all(self, value: Any) -> Any:
        """A value with breaks in all its strings."""
        return value if self.allow_special else changed_texts(value, self._safe)

    def _safe(self, text: str) -> str:
        return text if self.allow_special else controls(self.tokenizer).broken(text)

    def _rendered(self, messages: list[Message], plain: list[Message], generation: bool = False) -> str:
        text = self._apply(messages, generation, self._extras)
        # Breaks must only ever be seen again, not read: a template may look for a control token in a content.
        changed = messages != plain or self._extras != self._plain_extras
        if changed and text.replace(BREAK, "") != self._apply(plain, generation, self._plain_extras):
            raise InputError(
                f"the model's chat template reads control tokens that a content spells ({_spelt(self, plain)}); "
                "take them out, or keep them with --allow_special_in_text"
            )
        return text

    def _apply(self, messages: list[Message], generation: bool, extras: Extras) -> str:
        return self.dialect.apply(messages, generation, extras)


def common(*texts: str) -> str:
    """What all texts begin with."""
    low, high = min(texts), max(texts)  # all others lie between these two
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))]


def changed_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(str(key)): changed_texts(held, change) for key, held in value.items()}
    return [changed_texts(held, change) for held in value] if isinstance(value, list | tuple) else value


def _answered(messages: Sequence[Message], answer: str | Sequence[Message]) -> list[Message]:
    """The messages with the answer as turns of its own, or at the end of the one that is begun.

    Raises:
        InputError: an answer of several parts is to go on in a turn that is begun.
    """
    last, begun = messages[-1], is_begun(messages)
    if isinstance(answer, str):
        if begun:
            return [*messages[:-1], with_text(last, f"{text_of(last)}{answer}")]
        return [*messages, {"role": "assistant", "content": answer}]
    if begun and answer:
        first = answer[0]
        if said(first, THOUGHT_FIELDS):
            raise InputError("the prompt has begun the assistant's turn, so an answer cannot begin with a thought")
        return [*messages[:-1], {**last, **with_text(first, f"{text_of(last)}{text_of(first)}")}, *answer[1:]]
    return [*messages, *answer]


def _shows(shown: str, content: str) -> bool:
    """Whether squeezed text shows a squeezed content, as it is or as JSON spells it (results of tools, mostly)."""
    return content in shown or json.dumps(content, ensure_ascii=False)[1:-1] in shown


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _spelt(conversation: Conversation, messages: Iterable[dict[str, Any]]) -> str:
    known, found = controls(conversation.tokenizer), set[str]()

    def look(text: str) -> str:
        found.update(known.spelt(text))
        return text

    changed_texts(list(messages), look)
    return ", ".join(sorted(found))
