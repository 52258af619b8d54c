"""Prompts and answers in tokens, as one model reads them: under its own chat template, or under a template of ours."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data import special, templates
from rankalign.data.chat import Conversation, Said
from rankalign.data.cut import shortened
from rankalign.data.dialect import Extras
from rankalign.data.messages import (
    MESSAGE_FIELDS,
    SHOWN_COLUMNS,
    THOUGHT_FIELDS,
    no_thoughts,
    said,
    text_of,
    thoughts_in,
)
from rankalign.data.records import CandidateSet, Message, Prompt, Response, refusal
from rankalign.data.spans import Span, unlearned
from rankalign.data.texts import begin_alike
from rankalign.data.texts import encode_text as encode_text
from rankalign.errors import InputError
from rankalign.models.load import tokenizer_fingerprint

NEUTRAL: list[Message] = [{"role": "user", "content": "Hi"}]
THOUGHTS = ("keep", "mask", "drop")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to be put behind a prompt.

    Attributes:
        text: what it says.
        finished: it ends by itself, so it gets the end of its turn.
        drawn: token ids as they were sampled, if so.
        end: the token with which sampling ended it, if that is not the template's.
        messages: the answer in full, where its text does not say all of it.
    """

    text: str
    finished: bool = True
    drawn: tuple[int, ...] | None = None
    end: int | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def said(self) -> Said:
        """What the template is told."""
        return self.text if self.messages is None else self.messages


@dataclasses.dataclass(frozen=True)
class Written:
    """An answer in tokens.

    Attributes:
        ids: token ids, the one that ends the turn among them where it finished.
        unlearned: spans of them that get no loss: results of tools, and thoughts where those are masked.
    """

    ids: list[int]
    unlearned: tuple[Span, ...] = ()

    @property
    def learned(self) -> int:
        """How many tokens get a loss."""
        return len(self.ids) - sum(end - start for start, end in self.unlearned)

    def mask(self) -> list[bool]:
        """Which tokens get a loss."""
        return [not any(start <= place < end for start, end in self.unlearned) for place in range(len(self.ids))]


class Rendering:
    """Turns prompts and answers into tokens.

    Args:
        tokenizer: the model's.
        template: a name in :data:`rankalign.data.templates.NAMES`; ``auto`` is the tokenizer's chat template where it
            has one (a string prompt counts as a user's message unless it has been rendered already), else ``raw``.
        system: system message put before each prompt.
        allow_special: control tokens spelt in texts are control tokens.
        thoughts: ``keep`` writes what models thought as the template does, ``mask`` leaves it without a loss, ``drop``
            takes it out of prompts and answers before the template sees them.

    Attributes:
        counts: by reason: ``already_rendered`` (string prompts that end where an answer begins, taken as they are),
            ``roles_dropped`` (prompts of several roles, which ``raw`` joins without telling them apart),
            ``contents_not_shown`` (messages that the chat template leaves out), ``merged_at_the_border`` (answers whose
            first characters the tokenizer joins with the prompt's last; their tokens are those of the answer alone),
            ``without_end`` (finished answers for which the tokenizer knows no token to end them),
            ``special_in_text`` (texts in which control tokens are spelt, which are text), ``fields_not_shown`` (prompts
            with tools, calls, documents, names or keyword arguments that the template leaves out).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        system: str = "",
        allow_special: bool = False,
        thoughts: str = "keep",
    ) -> None:
        if thoughts not in THOUGHTS:
            raise InputError(f"thoughts: {thoughts!r} is none of {', '.join(THOUGHTS)}")
        self.tokenizer, self.template, self.system = tokenizer, templates.check_name(template), system
        self.allow_special, self.thoughts = allow_special, thoughts
        self.counts: Counter[str] = Counter()
        self._last: tuple[Prompt, dict[str, Any] | None, Conversation] | None = None

    # --- prompts -------------------------------------------------------------------------------------------------

    def prompt(self, prompt: Prompt, meta: dict[str, Any] | None = None) -> list[int]:
        """Token ids up to where the answer begins, with at most one beginning-of-sequence token.

        Raises:
            InputError: the template refuses the prompt, or is ``chat`` and the tokenizer has none.
        """
        self._count(prompt, meta)
        return self._prompt(prompt, meta)

    def prompt_of(self, record: CandidateSet) -> list[int]:
        """The prompt of a record, which an error names.

        Raises:
            RecordError: the template refuses it.
        """
        try:
            return self.prompt(record.prompt, record.meta)
        except InputError as error:
            raise refusal(record, "prompt", str(error)) from error

    def _prompt(self, prompt: Prompt, meta: dict[str, Any] | None, of_whole: bool = False) -> list[int]:
        """``of_whole`` ends it as it ends within a whole conversation, not with the generation prompt."""
        if self._chats(prompt):
            conversation = self._conversation(prompt, meta)
            return special.encode(self.tokenizer, conversation.before if of_whole else conversation.opening)
        return self._with_start(self._plain_text(prompt, meta))

    def _chats(self, prompt: Prompt) -> bool:
        """Whether the tokenizer's own chat template writes this prompt."""
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise InputError("template 'chat' needs a tokenizer with a chat template; use raw, alpaca, vicuna or hh")
        return bool(self.tokenizer.chat_template) and (
            self.template == "chat" or (self.template == "auto" and not self._rendered(prompt))
        )

    def _rendered(self, prompt: Prompt) -> bool:
        return isinstance(prompt, str) and not self.system and templates.is_rendered(prompt)

    def _conversation(self, prompt: Prompt, meta: dict[str, Any] | None) -> Conversation:
        """What the chat template makes of a prompt; of the last one asked for it is known already."""
        if self._last is None or self._last[0] is not prompt or self._last[1] is not meta:
            messages = self._messages(prompt)
            conversation = Conversation(self.tokenizer, messages, self.allow_special, Extras.of(meta))
            self._last = prompt, meta, conversation
        return self._last[2]

    def _messages(self, prompt: Prompt) -> list[Message]:
        messages = templates.as_messages(prompt, self.system)
        return no_thoughts(messages) if self.thoughts == "drop" else messages

    def _plain_text(self, prompt: Prompt, meta: dict[str, Any] | None) -> str:
        """The prompt under a template of ours, breaks in what its contents spell."""
        name = "raw" if self.template == "auto" else self.template
        if self._rendered(prompt):
            return str(prompt)
        _refuse_fields(prompt if isinstance(prompt, str) else self._messages(prompt), meta, name)
        guarded: Prompt = (
            self._safe_start(prompt)
            if isinstance(prompt, str)
            else [self._safe_message(m) for m in (no_thoughts(prompt) if self.thoughts == "drop" else prompt)]
        )
        told = dict(meta or {})
        # The template writes these and not the messages.
        if isinstance(told.get("alpaca"), dict):
            told["alpaca"] = {k: self._safe(v) if isinstance(v, str) else v for k, v in told["alpaca"].items()}
        return templates.render(guarded, name, self._safe(self.system), told)

    def _safe_message(self, message: Message) -> Message:
        return {**message, "content": self._safe(text_of(message))}

    def _safe(self, text: str) -> str:
        return text if self.allow_special else special.controls(self.tokenizer).broken(text)

    def _safe_start(self, text: str) -> str:
        """A string prompt that brings its own beginning of sequence keeps it, so that no second one is added."""
        bos = self.tokenizer.bos_token or ""
        return bos + self._safe(text[len(bos) :]) if bos and text.startswith(bos) else self._safe(text)

    def _with_start(self, text: str) -> list[int]:
        """Special tokens as the tokenizer adds them, less a doubled start and a closing end."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        ids = special.encode(self.tokenizer, text, add_special_tokens=not (bos and text.startswith(bos)))
        # Some tokenizers close every text with the end of sequence; behind a prompt an answer is still to come.
        if len(ids) > 1 and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token or "\0"):
            ids.pop()
        return ids

    # --- answers -------------------------------------------------------------------------------------------------

    def answer(self, response: Response) -> Answer:
        """A response of a record; tokens that were drawn with the same tokenizer go along."""
        if self.thoughts == "drop":
            response = response.thoughtless()
        tokens, messages = response.tokens, response.messages
        told = None if messages is None else tuple(messages)
        if not tokens or tokens["tokenizer"] != self.fingerprint:
            return Answer(response.text, response.finished, messages=told)
        return Answer(response.text, response.finished, tuple(tokens["ids"]), tokens.get("end"), told)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The tokenizer's, see :func:`rankalign.models.load.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.tokenizer)

    def answers(
        self, prompt: Prompt, answers: Sequence[Answer], meta: dict[str, Any] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens of :meth:`write` alone."""
        start, written = self.write(prompt, answers, meta)
        return start, [answer.ids for answer in written]

    def write(
        self, prompt: Prompt, answers: Sequence[Answer], meta: dict[str, Any] | None = None
    ) -> tuple[list[int], list[Written]]:
        """A prompt and answers to it, as a policy writes them.

        Under a chat template the answer is what that writes behind the prompt, up to and including the token that ends
        the turn, so that prompt and answer together are what ``apply_chat_template`` makes of the conversation.

        Args:
            prompt: text or messages.
            answers: to it.
            meta: the record's, with tools, documents and keyword arguments for the template.

        Raises:
            InputError: the template refuses the prompt or one of the answers, or does not show what they say.
        """
        self._count(prompt, meta)
        self._count_spelt(answers)
        if self._chats(prompt):
            return self._under_chat(self._conversation(prompt, meta), answers)
        return self._prompt(prompt, meta), [self._plain(answer, self.end_id(prompt)) for answer in answers]

    def _plain(self, answer: Answer, end: int | None) -> Written:
        ids = self._alone(answer, end)
        return Written(ids, self._thought_drawn(ids) if self.thoughts == "mask" else ())

    def whole(
        self, prompt: Prompt, answers: Sequence[Answer], meta: dict[str, Any] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """A prompt and answers to it, as a reward model reads them: whole conversations.

        Under a chat template everything that it writes behind an answer is part of it; else there is the token that
        ends the sequence, or that separates sequences. A cut answer ends where it ends. Tokens that a policy drew say
        nothing here.
        """
        self._count(prompt, meta)
        self._count_spelt(answers)
        if not self._chats(prompt):
            ends = self.tokenizer.eos_token_id, self.tokenizer.sep_token_id
            end = next((end for end in ends if end is not None), None)
            bare = [dataclasses.replace(answer, drawn=None) for answer in answers]
            return self._prompt(prompt, meta), [self._alone(answer, end) for answer in bare]
        conversation = self._conversation(prompt, meta)
        texts = [self._read(conversation, answer) for answer in answers]
        # Templates may write a prompt in another way once an answer follows; that part is then no longer shared.
        shared = special.encode(self.tokenizer, conversation.opening)
        for text in texts:
            shared = shared[: begin_alike(shared, text)]
        return shared, [text[len(shared) :] for text in texts]

    def _read(self, conversation: Conversation, answer: Answer) -> list[int]:
        text = conversation.whole(answer.said)
        if answer.messages is not None and (hidden := conversation.hidden_of(answer.messages)):
            raise InputError(f"the model's chat template does not show {', '.join(hidden)} of this answer")
        after = "" if answer.finished else conversation.closing(answer.said)[0]
        text = text[: len(text) - len(after)] if text.endswith(after) else text
        return special.encode(self.tokenizer, text)

    def _under_chat(self, conversation: Conversation, answers: Sequence[Answer]) -> tuple[list[int], list[Written]]:
        """Where the generation prompt opens what the whole conversation does not show (a thought, say), the prompt ends
        as the whole conversation has it; that cannot be where an answer was drawn behind the generation prompt."""
        before = conversation.opening
        told = [answer.said for answer in answers if answer.drawn is None]
        wholes = [conversation.whole(text) for text in told]
        if not all(text.startswith(before) for text in wholes):
            before = conversation.before
            if not all(text.startswith(before) for text in wholes):
                before = conversation.shared(before, wholes) or before
            if len(told) < len(answers):
                raise InputError(
                    "some answers were sampled behind the model's generation prompt, which the chat template does not "
                    "write before the others; give them in records of their own"
                )
        start = special.encode(self.tokenizer, before)
        return start, [self._answered(conversation, answer, before) for answer in answers]

    def _answered(self, conversation: Conversation, answer: Answer, before: str) -> Written:
        """Tokens of one answer. Where no token of the template ends it, the tokenizer's end of sequence does."""
        ending = conversation.end if answer.drawn is not None else conversation.closing(answer.said)[1]
        closing = ending if answer.finished else ""
        end = special.encode(self.tokenizer, ending)[-1:] if closing else self._eos(answer.finished)
        mask = self.thoughts == "mask"
        if answer.drawn is not None:
            ids = [*answer.drawn, *([answer.end] if answer.finished and answer.end is not None else end)]
            return Written(ids, self._thought_drawn(answer.drawn) if mask else ())
        text = conversation.written(answer.said, before) + closing
        ids = self._behind(before, text)
        spans = unlearned(conversation, answer.said, len(before), len(before) + len(text), mask)
        found = self._in_tokens(before, text, ids, [(a - len(before), b - len(before)) for a, b in spans])
        return Written(ids if closing else [*ids, *end], found)

    def _in_tokens(self, before: str, text: str, ids: list[int], spans: Sequence[Span]) -> tuple[Span, ...]:
        """Spans of characters as spans of tokens; a token that reaches over the border of one is not in it."""
        found = []
        for start, end in spans:
            first, inside = self._tokens_of(before, text[:start], ids)
            last = self._tokens_of(before, text[:end], ids)[0]
            found.append((first if inside else first + 1, last))
        return tuple((a, b) for a, b in found if a < b)

    def _tokens_of(self, before: str, text: str, ids: list[int]) -> tuple[int, bool]:
        """With how many of ``ids`` a text begins, and whether those are all of it."""
        own = self._behind(before, text, counted=False)
        count = begin_alike(own, ids)
        return count, count == len(own)

    def _thought_drawn(self, ids: Sequence[int]) -> tuple[Span, ...]:
        """The thoughts in tokens as they were sampled."""
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=False)
        spans = thoughts_in(str(decode(list(ids))))

        def reach(place: int) -> int:
            """The fewest tokens whose text is as long."""
            return bisect.bisect_left(range(len(ids) + 1), place, key=lambda count: len(str(decode(list(ids[:count])))))

        return tuple((reach(start), reach(end)) for start, end in spans)

    def _behind(self, before: str, text: str, counted: bool = True) -> list[int]:
        """Tokens of what stands behind ``before``: as in both together, or its own where a token spans the border."""
        # A control token parts what stands on its sides, so what stands before the last one need not be read again.
        before = before[special.controls(self.tokenizer).last(before) :]
        start, both = special.encode(self.tokenizer, before), special.encode(self.tokenizer, before + text)
        if both[: len(start)] == start:
            return both[len(start) :]
        self._add("merged_at_the_border", int(counted))
        return encode_text(self.tokenizer, text, guarded=True)

    def _eos(self, finished: bool) -> list[int]:
        """The tokenizer's end of sequence behind a finished answer, where it has one."""
        end = self.tokenizer.eos_token_id
        self._add("without_end", finished and end is None)
        return [int(end)] if finished and end is not None else []

    def end_id(self, prompt: Prompt = "") -> int | None:
        """The token that ends a turn: the chat template's, also behind a prompt that was rendered by it, else the
        tokenizer's end of sequence; None where there is none."""
        end: int | None = self.tokenizer.eos_token_id
        if not self.tokenizer.chat_template or self.template not in ("auto", "chat"):
            return end
        if prompt and not self._chats(prompt) and not str(prompt).rstrip().endswith(self._neutral[0]):
            return end
        return self._neutral[1]

    @functools.cached_property
    def _neutral(self) -> tuple[str, int | None]:
        """How the chat template opens and ends an answer."""
        try:
            conversation = self._conversation(NEUTRAL, None)
            end = special.encode(self.tokenizer, conversation.end) if conversation.end else []
            opening = conversation.opening.rpartition(str(NEUTRAL[0]["content"]))[2]
        except InputError:
            return "\0", self.tokenizer.eos_token_id  # with which no prompt ends
        return opening.strip() or "\0", end[-1] if end else self.tokenizer.eos_token_id

    def _alone(self, answer: Answer, end: int | None) -> list[int]:
        """An answer whose tokens do not depend on its prompt.

        Raises:
            InputError: it says more than a text.
        """
        if answer.messages is not None and answer.drawn is None:
            _refuse_fields(list(answer.messages), None, "raw" if self.template == "auto" else self.template)
        self._add("without_end", answer.finished and end is None)
        if answer.drawn is not None:
            ids, end = list(answer.drawn), end if answer.end is None else answer.end
        else:
            ids = encode_text(self.tokenizer, answer.text, self.allow_special)
        return [*ids, end] if answer.finished and end is not None else ids

    # --- what is too long ----------------------------------------------------------------------------------------

    def shortened(self, ids: list[int], room: int, prompt: Prompt, meta: dict[str, Any] | None = None) -> list[int]:
        """A prompt's tokens cut to ``room`` by the one rule for a prompt that is too long, see
        :func:`rankalign.data.cut.shortened`.

        Args:
            ids: the whole prompt's.
            room: most tokens.
            prompt: where ``ids`` come from.
            meta: the record's.
        """
        # Told by the tokens: callers hand over no more.
        of_whole = len(ids) > room and self._chats(prompt) and ids != self._prompt(prompt, meta)
        probed = not self._rendered(prompt)
        specials = self.tokenizer.all_special_ids
        return shortened(ids, room, prompt, meta, lambda p, m: self._prompt(p, m, of_whole), probed, specials)

    # --- counts --------------------------------------------------------------------------------------------------

    def _count(self, prompt: Prompt, meta: dict[str, Any] | None) -> None:
        if self._rendered(prompt):
            self._add("already_rendered", 1)
            self._add("fields_not_shown", bool(said(meta, SHOWN_COLUMNS)))
            return
        messages = self._messages(prompt)
        self._add("special_in_text", any(self._spells(text_of(message)) for message in messages))
        if self._chats(prompt):
            conversation = self._conversation(prompt, meta)
            self._add("contents_not_shown", len(conversation.hidden()))
            if said(meta, SHOWN_COLUMNS) or any(said(message, MESSAGE_FIELDS) for message in messages):
                self._add("fields_not_shown", bool(conversation.unshown()))
            return
        named = any(said(message, ("name",)) for message in messages)
        self._add("fields_not_shown", named or bool(said(meta, ("chat_template_kwargs",))))
        if self.template in ("auto", "raw"):
            self._add("roles_dropped", len(messages) > 1)

    def _count_spelt(self, answers: Sequence[Answer]) -> None:
        self._add("special_in_text", sum(a.drawn is None and self._spells(_all_text(a)) for a in answers))

    def _add(self, name: str, count: int) -> None:
        if count:
            self.counts[name] += count

    def _spells(self, text: str) -> bool:
        return not self.allow_special and bool(special.controls(self.tokenizer).spelt(text))


def _all_text(answer: Answer) -> str:
    """Everything that an answer spells."""
    return answer.text if answer.messages is None else json.dumps(answer.messages, ensure_ascii=False)


def _refuse_fields(prompt: Prompt, meta: dict[str, Any] | None, name: str) -> None:
    """Refuse what a template of ours has no place for.

    Raises:
        InputError: naming it.
    """
    messages = [] if isinstance(prompt, str) else prompt
    found = [field for message in messages for field in said(message, MESSAGE_FIELDS) if field != "name"]
    found += ["the results of tools"] if any(message["role"] == "tool" for message in messages) and found else []
    if found := [*said(meta, ("tools", "documents")), *found]:
        thought = "; --thoughts drop leaves thoughts out" if {*found} & {*THOUGHT_FIELDS} else ""
        raise InputError(f"template {name!r} has no place for {found[0]}; use a model with a chat template{thought}")
