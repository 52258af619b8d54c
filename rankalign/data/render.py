"""Prompts and answers in tokens, as one model reads them: under its own chat template, or under a template of ours."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data import special, templates
from rankalign.data.chat import PROBE, Conversation
from rankalign.data.records import CandidateSet, Message, Prompt, Response, refusal
from rankalign.errors import InputError
from rankalign.models.load import tokenizer_fingerprint

# Behind the first of these that does not become one token with a text, the text is encoded as it stands in a line.
ANCHORS = ("\n", "|", "0")
NEUTRAL: list[Message] = [{"role": "user", "content": "Hi"}]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to be put behind a prompt.

    Attributes:
        text: what it says.
        finished: it ends by itself, so it gets the end of its turn.
        drawn: token ids as they were sampled, if so.
        end: the token with which sampling ended it, if that is not the template's.
    """

    text: str
    finished: bool = True
    drawn: tuple[int, ...] | None = None
    end: int | None = None


class Rendering:
    """Turns prompts and answers into tokens.

    Args:
        tokenizer: the model's.
        template: a name in :data:`rankalign.data.templates.NAMES`; ``auto`` is the tokenizer's chat template where it
            has one (a string prompt counts as a user's message unless it has been rendered already), else ``raw``.
        system: system message put before each prompt.
        allow_special: control tokens spelt in texts are control tokens.

    Attributes:
        counts: by reason: ``already_rendered`` (string prompts that end where an answer begins, taken as they are),
            ``roles_dropped`` (prompts of several roles, which ``raw`` joins without telling them apart),
            ``contents_not_shown`` (messages that the chat template leaves out), ``merged_at_the_border`` (answers whose
            first characters the tokenizer joins with the prompt's last; their tokens are those of the answer alone),
            ``without_end`` (finished answers for which the tokenizer knows no token to end them),
            ``special_in_text`` (texts in which control tokens are spelt, which are text).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        system: str = "",
        allow_special: bool = False,
    ) -> None:
        self.tokenizer, self.template, self.system = tokenizer, templates.check_name(template), system
        self.allow_special = allow_special
        self.counts: Counter[str] = Counter()
        self._last: tuple[Prompt, Conversation] | None = None

    # --- prompts -------------------------------------------------------------------------------------------------

    def prompt(self, prompt: Prompt, meta: dict[str, Any] | None = None) -> list[int]:
        """Token ids up to where the answer begins, with at most one beginning-of-sequence token.

        Raises:
            InputError: the template refuses the prompt, or is ``chat`` and the tokenizer has none.
        """
        self._count(prompt)
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
            conversation = self._conversation(prompt)
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

    def _conversation(self, prompt: Prompt) -> Conversation:
        """What the chat template makes of a prompt; of the last one asked for it is known already."""
        if self._last is None or self._last[0] is not prompt:
            messages = templates.as_messages(prompt, self.system)
            self._last = prompt, Conversation(self.tokenizer, messages, self.allow_special)
        return self._last[1]

    def _plain_text(self, prompt: Prompt, meta: dict[str, Any] | None) -> str:
        """The prompt under a template of ours, breaks in what its contents spell."""
        name = "raw" if self.template == "auto" else self.template
        if self._rendered(prompt):
            return str(prompt)
        guarded: Prompt = (
            self._safe_start(prompt) if isinstance(prompt, str) else [self._safe_message(m) for m in prompt]
        )
        told = dict(meta or {})
        # The template writes these and not the messages.
        if isinstance(told.get("alpaca"), dict):
            told["alpaca"] = {k: self._safe(v) if isinstance(v, str) else v for k, v in told["alpaca"].items()}
        return templates.render(guarded, name, self._safe(self.system), told)

    def _safe_message(self, message: Message) -> Message:
        return {**message, "content": self._safe(str(message["content"]))}

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
        tokens = response.tokens
        if not tokens or tokens["tokenizer"] != self.fingerprint:
            return Answer(response.text, response.finished)
        return Answer(response.text, response.finished, tuple(tokens["ids"]), tokens.get("end"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The tokenizer's, see :func:`rankalign.models.load.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.tokenizer)

    def answers(
        self, prompt: Prompt, answers: Sequence[Answer], meta: dict[str, Any] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """A prompt and answers to it, as a policy writes them.

        Under a chat template the answer is what that writes behind the prompt, up to and including the token that ends
        the turn, so that prompt and answer together are what ``apply_chat_template`` makes of the conversation.

        Raises:
            InputError: the template refuses the prompt or one of the answers.
        """
        self._count(prompt)
        self._count_spelt(answers)
        if self._chats(prompt):
            return self._under_chat(self._conversation(prompt), answers)
        return self._prompt(prompt, meta), [self._alone(answer, self.end_id(prompt)) for answer in answers]

    def whole(
        self, prompt: Prompt, answers: Sequence[Answer], meta: dict[str, Any] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """A prompt and answers to it, as a reward model reads them: whole conversations.

        Under a chat template everything that it writes behind an answer is part of it; else there is the token that
        ends the sequence, or that separates sequences. A cut answer ends where it ends. Tokens that a policy drew say
        nothing here.
        """
        self._count(prompt)
        self._count_spelt(answers)
        if not self._chats(prompt):
            ends = self.tokenizer.eos_token_id, self.tokenizer.sep_token_id
            end = next((end for end in ends if end is not None), None)
            bare = [dataclasses.replace(answer, drawn=None) for answer in answers]
            return self._prompt(prompt, meta), [self._alone(answer, end) for answer in bare]
        conversation = self._conversation(prompt)
        texts = [self._read(conversation, answer) for answer in answers]
        # Templates may write a prompt in another way once an answer follows; that part is then no longer shared.
        shared = special.encode(self.tokenizer, conversation.opening)
        for text in texts:
            shared = shared[: _common(shared, text)]
        return shared, [text[len(shared) :] for text in texts]

    def _read(self, conversation: Conversation, answer: Answer) -> list[int]:
        text = conversation.whole(answer.text)
        if not answer.finished:
            text = text[: len(text) - len(conversation.after)] if text.endswith(conversation.after) else text
        return special.encode(self.tokenizer, text)

    def _under_chat(self, conversation: Conversation, answers: Sequence[Answer]) -> tuple[list[int], list[list[int]]]:
        """Where the generation prompt opens what the whole conversation does not show (a thought, say), the prompt ends
        as the whole conversation has it; that cannot be where an answer was drawn behind the generation prompt."""
        before = conversation.opening
        told = [answer.text for answer in answers if answer.drawn is None]
        if not all(conversation.whole(text).startswith(before) for text in told):
            before = conversation.before
            if len(told) < len(answers):
                raise InputError(
                    "some answers were sampled behind the model's generation prompt, which the chat template does not "
                    "write before the others; give them in records of their own"
                )
        start = special.encode(self.tokenizer, before)
        return start, [self._answered(conversation, answer, before) for answer in answers]

    def _answered(self, conversation: Conversation, answer: Answer, before: str) -> list[int]:
        """Tokens of one answer. Where no token of the template ends it, the tokenizer's end of sequence does."""
        closing = conversation.end if answer.finished else ""
        end = special.encode(self.tokenizer, conversation.end)[-1:] if closing else self._eos(answer.finished)
        if answer.drawn is not None:
            return [*answer.drawn, *([answer.end] if answer.finished and answer.end is not None else end)]
        ids = self._behind(before, conversation.written(answer.text, before) + closing)
        return ids if closing else [*ids, *end]

    def _behind(self, before: str, text: str) -> list[int]:
        """Tokens of what stands behind ``before``: as in both together, or its own where a token spans the border."""
        # A control token parts what stands on its sides, so what stands before the last one need not be read again.
        before = before[special.controls(self.tokenizer).last(before) :]
        start, both = special.encode(self.tokenizer, before), special.encode(self.tokenizer, before + text)
        if both[: len(start)] == start:
            return both[len(start) :]
        self._add("merged_at_the_border", 1)
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
            conversation = self._conversation(NEUTRAL)
            end = special.encode(self.tokenizer, conversation.end) if conversation.end else []
            opening = conversation.opening.rpartition(str(NEUTRAL[0]["content"]))[2]
        except InputError:
            return "\0", self.tokenizer.eos_token_id  # with which no prompt ends
        return opening.strip() or "\0", end[-1] if end else self.tokenizer.eos_token_id

    def _alone(self, answer: Answer, end: int | None) -> list[int]:
        """An answer whose tokens do not depend on its prompt."""
        self._add("without_end", answer.finished and end is None)
        if answer.drawn is not None:
            ids, end = list(answer.drawn), end if answer.end is None else answer.end
        else:
            ids = encode_text(self.tokenizer, answer.text, self.allow_special)
        return [*ids, end] if answer.finished and end is not None else ids

    # --- what is too long ----------------------------------------------------------------------------------------

    def shortened(self, ids: list[int], room: int, prompt: Prompt, meta: dict[str, Any] | None = None) -> list[int]:
        """A prompt's tokens cut to ``room``: the one rule for a prompt that is too long.

        The oldest exchanges go first, whole. Where the last one alone is too long, the user's message in it loses its
        beginning. The beginning of the sequence, the system message, the headers of the turns that are left and what
        opens the answer stay, so long as there is room for them.

        Args:
            ids: the whole prompt's.
            room: most tokens.
            prompt: where ``ids`` come from.
            meta: the record's.
        """
        if len(ids) <= room:
            return ids
        # Told by the tokens: callers hand over no more.
        of_whole = self._chats(prompt) and ids != self._prompt(prompt, meta)
        last = prompt
        for start in [] if isinstance(prompt, str) else [i for i, m in enumerate(prompt) if m["role"] == "user"][1:]:
            last = _latest(prompt, start)
            ids = self._prompt(last, meta, of_whole)
            if len(ids) <= room:
                return ids
        return self._cut(ids, room, last, meta, of_whole)

    def _cut(self, ids: list[int], room: int, prompt: Prompt, meta: dict[str, Any] | None, of_whole: bool) -> list[int]:
        """The first user's message loses its beginning; where it stands is read off the same prompt without it."""
        head, tail = 0, 0
        if not self._rendered(prompt):
            other = self._prompt(_probed(prompt), _probed_meta(meta), of_whole)
            head = _common(ids, other)
            tail = min(_common(ids[::-1], other[::-1]), len(ids) - head)
        if not head or head + tail >= room:
            # The first token may be the start of the sequence, which models expect whatever else is lost.
            head = int(ids[0] in self.tokenizer.all_special_ids and room > 1)
        return ids[:head] + ids[len(ids) - (room - head) :]

    # --- counts --------------------------------------------------------------------------------------------------

    def _count(self, prompt: Prompt) -> None:
        if self._rendered(prompt):
            self._add("already_rendered", 1)
            return
        messages = templates.as_messages(prompt, self.system)
        self._add("special_in_text", any(self._spells(str(message["content"])) for message in messages))
        if self._chats(prompt):
            self._add("contents_not_shown", len(self._conversation(prompt).hidden()))
        elif self.template in ("auto", "raw"):
            self._add("roles_dropped", len(messages) > 1)

    def _count_spelt(self, answers: Sequence[Answer]) -> None:
        self._add("special_in_text", sum(a.drawn is None and self._spells(a.text) for a in answers))

    def _add(self, name: str, count: int) -> None:
        if count:
            self.counts[name] += count

    def _spells(self, text: str) -> bool:
        return not self.allow_special and bool(special.controls(self.tokenizer).spelt(text))


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, allow_special: bool = False, guarded: bool = False
) -> list[int]:
    """Token ids of an answer alone: no special tokens added, and no blank in front that was not there.

    SentencePiece tokenizers put a blank before a text that begins a word. Behind a line feed they do not, so for them
    the text is encoded behind one, which is taken off again.

    Args:
        tokenizer: whose ids.
        text: what to encode.
        allow_special: control tokens that the text spells are control tokens, not text.
        guarded: the text holds breaks already.
    """
    if not allow_special and not guarded:
        text = special.controls(tokenizer).broken(text)
    if not _adds_blank(tokenizer):
        return special.encode(tokenizer, text)
    for anchor in ANCHORS:
        before, both = special.encode(tokenizer, anchor), special.encode(tokenizer, anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return special.encode(tokenizer, text)


def _adds_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    return " a" in str(tokenizer.decode(special.encode(tokenizer, "\n") + special.encode(tokenizer, "a")))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _latest(messages: Prompt, start: int) -> list[Message]:
    """The system messages of a list, and the others from ``start`` on."""
    return [m for i, m in enumerate(templates.as_messages(messages)) if i >= start or m["role"] == "system"]


def _probed(prompt: Prompt) -> Prompt:
    """The prompt with nothing said in its first user's message."""
    if isinstance(prompt, str):
        return PROBE
    first = next((i for i, m in enumerate(prompt) if m["role"] == "user"), len(prompt) - 1)
    return [{**m, "content": PROBE} if i == first else m for i, m in enumerate(prompt)]


def _probed_meta(meta: dict[str, Any] | None) -> dict[str, Any]:
    told = dict(meta or {})
    if isinstance(told.get("alpaca"), dict):
        told["alpaca"] = {**told["alpaca"], "instruction": PROBE}
    return told
