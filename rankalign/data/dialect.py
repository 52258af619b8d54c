"""How one chat template wants to be told a conversation: the small differences between templates, found by trying.

Templates are programs. Some read parts of a content, most print the list; some print the arguments of a call that are a
JSON text as they are, others would quote them once more. What a template makes of a probe says which it is.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rankalign.data.messages import Message, decoded, said, text_of
from rankalign.errors import InputError

_PROBE = "\U0010fffb"


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a record tells a template beside its messages.

    Attributes:
        tools: the tools' descriptions, or None.
        documents: texts to answer from, or None.
        options: keyword arguments, ``enable_thinking`` and the like.
    """

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, meta: Mapping[str, Any] | None) -> Extras:
        """The extras of a record, from its ``meta``; what tables keep as JSON text is read."""
        told = meta or {}
        lists = [decoded(told.get(name)) for name in ("tools", "documents")]
        tools, documents = ([decoded(entry) for entry in found] if found else None for found in lists)
        return cls(tools, documents, decoded(told.get("chat_template_kwargs")) or {})

    def changed(self, change: Callable[[Any], Any]) -> Extras:
        """With every value changed."""
        return Extras(change(self.tools), change(self.documents), {k: change(v) for k, v in self.options.items()})

    def without(self, name: str) -> Extras:
        """Without tools or documents."""
        return Extras(
            None if name == "tools" else self.tools, None if name == "documents" else self.documents, self.options
        )


class Dialect:
    """A tokenizer's chat template, and what it makes of what.

    Args:
        tokenizer: one with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Weak: dialects are kept by their tokenizers, which would never go otherwise.
        self._tokenizer = weakref.ref(tokenizer)
        self.template = str(tokenizer.chat_template)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Whose template it is."""
        found = self._tokenizer()
        assert found is not None  # whoever asks holds it
        return found

    @property
    def marks_generation(self) -> bool:
        """Whether the template says by ``{% generation %}`` what the assistant writes."""
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.template))

    def mentions(self, name: str) -> bool:
        """Whether a keyword argument stands in the template's text."""
        return bool(re.search(rf"\b{re.escape(name)}\b", self.template))

    def read(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as this template reads them."""
        return [self._message(message) for message in messages]

    def apply(self, messages: list[Message], generation: bool, extras: Extras) -> str:
        """The text that ``apply_chat_template`` writes.

        Raises:
            InputError: the template refuses, for whatever reason.
        """
        options: dict[str, Any] = dict(extras.options)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=extras.tools,
                    documents=extras.documents,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **options,
                )
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise InputError(f"the model's chat template refuses this prompt: {error}") from error

    def tracked(self, messages: list[Message], extras: Extras) -> tuple[str, list[tuple[int, int]]]:
        """The same text without a generation prompt, and where in it the template says that the assistant writes."""
        options: dict[str, Any] = {**self.tokenizer.special_tokens_map, **extras.options}
        bare = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            found: Any = render_jinja_template(
                conversations=[bare],
                tools=extras.tools,
                documents=extras.documents,
                chat_template=self.tokenizer.get_chat_template(None, extras.tools),
                return_assistant_tokens_mask=True,
                **options,
            )
        except Exception as error:
            raise InputError(f"the model's chat template refuses this prompt: {error}") from error
        (text,), (spans,) = found
        return str(text), [(int(start), int(end)) for start, end in spans]

    def _message(self, message: Message) -> Message:
        told = message
        if isinstance(told.get("content"), list) and not self._reads_parts:
            told = {**told, "content": text_of(told)}
        if said(told, ("tool_calls",)):
            told = {**told, "tool_calls": self._calls(decoded(told["tool_calls"]))}
        return told

    def _calls(self, calls: Any) -> Any:
        """Calls with their arguments as the template wants them; transformers' own form is a mapping."""
        if not isinstance(calls, list):
            return calls
        return [self._call(decoded(call)) for call in calls]

    def _call(self, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        told = call.get("function", call)
        if not isinstance(told, dict) or not isinstance(told.get("arguments"), str) or self._prints_arguments:
            return call
        arguments = decoded(told["arguments"] or "{}")
        changed = {**told, "arguments": arguments}
        return {**call, "function": changed} if "function" in call else changed

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """Whether parts of a content are written as their text is."""
        parts = [{"type": "text", "text": _PROBE}]
        user = {"role": "user", "content": _PROBE}
        whole = self._try([user])
        return whole is not None and self._try([{**user, "content": parts}]) == whole

    @functools.cached_property
    def _prints_arguments(self) -> bool:
        """Whether arguments that are a JSON text stand in what is written as they are, not quoted once more."""
        text = '{"a": "' + _PROBE + '"}'
        written = self._try([{"role": "user", "content": "a"}, _calling(text), {"role": "tool", "content": "b"}])
        return written is not None and text in written

    def _try(self, messages: list[Message]) -> str | None:
        try:
            return self.apply(messages, False, Extras())
        except InputError:
            return None


def _calling(arguments: Any) -> Message:
    call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Dialect] = weakref.WeakKeyDictionary()


def dialect_of(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """The dialect of a tokenizer's chat template, tried once."""
    found = _known.get(tokenizer)
    if found is None or found.template != str(tokenizer.chat_template):  # templates can be set at any time
        found = _known[tokenizer] = Dialect(tokenizer)
    return found
