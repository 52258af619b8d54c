"""Records to tokens: prompts and responses are encoded apart, so a response's tokens never depend on its prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data import templates
from rankalign.data.records import CandidateSet, Prompt, Response
from rankalign.errors import InputError
from rankalign.models.load import tokenizer_fingerprint


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    template: str = "auto",
    system: str = "",
    meta: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids up to where the answer begins, with at most one beginning-of-sequence token.

    ``auto`` is the tokenizer's chat template where it has one (a string prompt counts as a user's message unless it
    has been rendered already), else ``raw``.

    Raises:
        InputError: template ``chat`` with a tokenizer that has none, or an unknown template.
    """
    if templates.check_name(template) == "auto":
        rendered = isinstance(prompt, str) and not system and templates.is_rendered(prompt)
        template = "chat" if tokenizer.chat_template and not rendered else "raw"
    if template != "chat":
        text = templates.render(prompt, template, system, meta)
    elif tokenizer.chat_template:
        text = _chat_text(tokenizer, templates.as_messages(prompt, system))
    else:
        raise InputError("template 'chat' needs a tokenizer with a chat template; use raw, alpaca, vicuna or hh")
    return _with_bos(tokenizer, text)


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise InputError(f"the model's chat template refuses this prompt: {error}") from error


def _with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Special tokens as the tokenizer adds them, less a doubled start and a closing end."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    ids = list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer alone: no special tokens added, and no blank in front that was not there.

    SentencePiece tokenizers put a blank before a text that begins a word. Behind a line feed they do not, so for them
    the text is encoded behind one, which is taken off again.
    """
    if not _adds_blank(tokenizer):
        return _plain(tokenizer, text)
    anchor, behind = _plain(tokenizer, "\n"), _plain(tokenizer, "\n" + text)
    return behind[len(anchor) :] if behind[: len(anchor)] == anchor else _plain(tokenizer, text)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _adds_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    return " a" in str(tokenizer.decode(_plain(tokenizer, "\n") + _plain(tokenizer, "a")))


@dataclass(frozen=True)
class TokenList:
    """One prompt and its candidates in tokens.

    Attributes:
        id: the record's.
        prompt: token ids of the prompt, shared by all candidates.
        responses: token ids of each candidate, its end-of-sequence token included where it finished.
        scores: one finite score a candidate.
    """

    id: str
    prompt: list[int]
    responses: list[list[int]]
    scores: list[float]


@dataclass(frozen=True)
class EncodeOptions:
    """How records become token lists.

    Attributes:
        judge: whose scores rank the candidates; empty takes the only judge there is.
        template: see :func:`encode_prompt`.
        system: system message put before each prompt.
        max_length: most tokens of prompt and response together.
        max_candidates: keep at most this many candidates a prompt, spread evenly over the ranking; 0 keeps all.
        only_use_provide: the last two responses only (RRHF's setting P).
        only_use_sample: all but the last two (RRHF's settings D and B).
        stop_response: cut responses at the dialogue marks of HH.
    """

    judge: str = ""
    template: str = "auto"
    system: str = ""
    max_length: int = 512
    max_candidates: int = 0
    only_use_provide: bool = False
    only_use_sample: bool = False
    stop_response: bool = False


class Encoder:
    """Turns records into token lists and counts all that is cut or left out on the way.

    Attributes:
        counts: by reason: ``prompts``, ``candidates``, ``unscored``, ``empty``, ``not_selected``, ``prompt_truncated``,
            ``response_truncated``, ``dropped_prompts``, ``tied_pairs``, ``pairs``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.counts: Counter[str] = Counter()

    def encode(self, record: CandidateSet) -> TokenList | None:
        """One record; None (counted as ``dropped_prompts``) where no candidate is left."""
        prompt = encode_prompt(self.tokenizer, record.prompt, self.options.template, self.options.system, record.meta)
        chosen = self._select(record)
        responses = [(self.response(response), score) for response, score in chosen]
        kept = [(ids, score) for ids, score in responses if ids]
        self.counts["empty"] += len(responses) - len(kept)
        if not kept:
            self.counts["dropped_prompts"] += 1
            return None
        prompt, cut = self._fit(prompt, [ids for ids, _ in kept])
        scores = [score for _, score in kept]
        self._count(scores)
        return TokenList(record.id, prompt, cut, scores)

    def response(self, response: Response) -> list[int]:
        """Tokens of one response: those it was sampled with where the tokenizer is the same, else its text encoded;
        an end-of-sequence token only if it finished."""
        text, stopped = response.text, False
        if self.options.stop_response:
            text, stopped = templates.cut_at_stop(text, templates.HH_STOPS)
        tokens = response.tokens
        if tokens and not stopped and tokens["tokenizer"] == self.fingerprint:
            ids = list(tokens["ids"])
        else:
            ids = encode_text(self.tokenizer, text)
        return [*ids, self.tokenizer.eos_token_id] if response.finished or stopped else ids

    def _select(self, record: CandidateSet) -> list[tuple[Response, float]]:
        """The scored responses that the options ask for."""
        wanted, options = record.responses, self.options
        if options.only_use_provide:
            wanted = wanted[-2:]
        elif options.only_use_sample:
            wanted = wanted[:-2]
        self.counts["not_selected"] += len(record.responses) - len(wanted)
        scored = [(r, s) for r in wanted if (s := r.scores.get(options.judge)) is not None]
        self.counts["unscored"] += len(wanted) - len(scored)
        kept = spread(scored, options.max_candidates)
        self.counts["not_selected"] += len(scored) - len(kept)
        return kept

    def _fit(self, prompt: list[int], responses: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """Cut to ``max_length``. The prompt gives way first, from its left, down to half of the length; a response
        that is still too long loses its end, and with it its end-of-sequence token."""
        limit = self.options.max_length
        room = max(limit - max(map(len, responses)), limit // 2, 1)
        if len(prompt) > room:
            self.counts["prompt_truncated"] += 1
            prompt = prompt[-room:]
        cut = [ids[: limit - len(prompt)] for ids in responses]
        self.counts["response_truncated"] += sum(len(a) < len(b) for a, b in zip(cut, responses, strict=True))
        return prompt, cut

    def _count(self, scores: list[float]) -> None:
        pairs = len(scores) * (len(scores) - 1) // 2
        tied = sum(a == b for i, a in enumerate(scores) for b in scores[:i])
        self.counts.update(prompts=1, candidates=len(scores), pairs=pairs - tied, tied_pairs=tied)


def spread(scored: list[tuple[Response, float]], limit: int) -> list[tuple[Response, float]]:
    """At most ``limit`` candidates, evenly over the ranking with best and worst among them, in their first order."""
    if not limit or len(scored) <= limit:
        return scored
    order = sorted(range(len(scored)), key=lambda i: -scored[i][1])
    step = (len(scored) - 1) / max(limit - 1, 1)
    keep = {order[round(i * step)] for i in range(limit)}
    return [scored[i] for i in sorted(keep)]


def encode_all(
    sets: Iterable[CandidateSet], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> tuple[list[TokenList], dict[str, int]]:
    """All records as token lists, with the counts of :class:`Encoder`."""
    encoder = Encoder(tokenizer, options)
    lists = [tokens for record in sets if (tokens := encoder.encode(record)) is not None]
    return lists, dict(encoder.counts)
