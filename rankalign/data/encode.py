"""Records to tokens: prompts, answers up to the token that ends their turn, and the one rule for what is too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data import messages, templates
from rankalign.data.judges import combined, weighted
from rankalign.data.records import CandidateSet, Prompt, Response, is_own, refusal
from rankalign.data.render import NEUTRAL, Answer, Rendering, Written, encode_text
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import OnError, give_up

__all__ = [
    "EncodeOptions",
    "Encoder",
    "TokenList",
    "encode_all",
    "encode_prompt",
    "encode_text",
    "fit",
    "said",
    "spread",
]

# What is worth a word where it happened, beside the counts of a data set.
NOTES = {
    "already_rendered": "string prompts end where an answer begins, so no template was put around them",
    "roles_dropped": "prompts have several messages, whose roles vanish: there is no chat template to tell them apart",
    "contents_not_shown": "messages are not shown to the model by its chat template",
    "fields_not_shown": "prompts say more (tools, calls, documents, names, arguments) than the template shows",
    "merged_at_the_border": "answers begin with what the tokenizer would join with the prompt's end; encoded apart",
    "special_in_text": "texts spell control tokens, which are encoded as text (--allow_special_in_text keeps them)",
    "margin_unused": "pairs state a margin, which no loss reads",
    "without_end": "finished answers get no end: the tokenizer knows no end of sequence",
}


def said(counts: Mapping[str, int]) -> list[str]:
    """What :class:`rankalign.data.render.Rendering` counted, in words; nothing of what did not happen."""
    return [f"{counts[name]} {words}" for name, words in NOTES.items() if counts.get(name)]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    template: str = "auto",
    system: str = "",
    meta: dict[str, Any] | None = None,
    allow_special: bool = False,
) -> list[int]:
    """Token ids up to where the answer begins, with at most one beginning-of-sequence token; see
    :class:`rankalign.data.render.Rendering`.

    Raises:
        InputError: template ``chat`` with a tokenizer that has none, or an unknown template.
    """
    return Rendering(tokenizer, template, system, allow_special).prompt(prompt, meta)


def fit(
    prompt: list[int], responses: list[list[int]], limit: int, shorten: Callable[[list[int], int], list[int]]
) -> tuple[list[int], list[list[int]]]:
    """A list cut to ``limit`` tokens: the one rule of every stage. Spans that get no loss are cut with :func:`clip`.

    The prompt gives way first, down to half of the limit, by ``shorten(prompt, room)``
    (:meth:`rankalign.data.render.Rendering.shortened`); a response that is still too long loses its end, and with it
    the token that ends it.
    """
    room = max(limit - max(map(len, responses), default=0), limit // 2, 1)
    if len(prompt) > room:
        prompt = shorten(prompt, room)
    return prompt, [ids[: limit - len(prompt)] for ids in responses]


Spans = tuple[tuple[int, int], ...]


def clip(spans: Iterable[tuple[int, int]], length: int) -> Spans:
    """Spans of an answer's tokens, of which ``length`` are left."""
    return tuple((start, min(end, length)) for start, end in spans if start < length)


@dataclass(frozen=True)
class TokenList:
    """One prompt and its candidates in tokens.

    Attributes:
        id: the record's.
        prompt: token ids of the prompt, shared by all candidates.
        responses: token ids of each candidate, the token that ends its turn included where it finished.
        scores: one finite score a candidate; with axes, their mean.
        axes: of a reward model with several outputs, the scores of each candidate by axis; else empty.
        unlearned: for each candidate the spans ``(start, end)`` of its tokens that are context and get no loss: results
            of tools, masked thoughts. Empty where no candidate of the list has any.
        own: for each candidate whether the model that is trained wrote it, as rounds note it; empty where none is said.
    """

    id: str
    prompt: list[int]
    responses: list[list[int]]
    scores: list[float]
    axes: list[list[float]] = field(default_factory=list)
    unlearned: list[Spans] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each candidate that get a loss."""
        sizes = map(len, self.responses)
        if not self.unlearned:
            return list(sizes)
        return [n - sum(b - a for a, b in spans) for n, spans in zip(sizes, self.unlearned, strict=True)]


@dataclass(frozen=True)
class EncodeOptions:
    """How records become token lists.

    Attributes:
        judge: whose scores rank the candidates, or several with weights, see :func:`rankalign.data.judges.weighted`.
        axes: judges whose scores are kept apart, one an output of a reward model; by their mean the candidates rank.
        template: see :func:`encode_prompt`.
        system: system message put before each prompt.
        max_length: most tokens of prompt and response together.
        max_candidates: keep at most this many candidates a prompt, spread evenly over the ranking; 0 keeps all.
        only_use_provide: the last two responses only (RRHF's setting P).
        only_use_sample: all but the last two (RRHF's settings D and B).
        stop_response: cut responses at the dialogue marks of HH.
        allow_special_in_text: control tokens that texts spell are control tokens.
        whole: as a reward model reads them, with all that the chat template writes behind an answer.
        thoughts: ``keep``, ``mask`` (in context, without a loss) or ``drop``, see
            :class:`rankalign.data.render.Rendering`.
    """

    judge: str = ""
    axes: tuple[str, ...] = ()
    template: str = "auto"
    system: str = ""
    max_length: int = 512
    max_candidates: int = 0
    only_use_provide: bool = False
    only_use_sample: bool = False
    stop_response: bool = False
    allow_special_in_text: bool = False
    whole: bool = False
    thoughts: str = "keep"


class Encoder:
    """Turns records into token lists and counts all that is cut or left out on the way.

    Attributes:
        counts: by reason: ``prompts``, ``candidates``, ``unscored``, ``empty``, ``not_selected``, ``prompt_truncated``,
            ``response_truncated``, ``dropped_prompts``, ``tied_pairs``, ``pairs``, ``all_masked`` (responses of which
            nothing would be learned), ``tokens_without_loss``, and those of
            :class:`rankalign.data.render.Rendering`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.weights = weighted(options.judge)
        self.rendering = Rendering(
            tokenizer, options.template, options.system, options.allow_special_in_text, options.thoughts
        )
        self.counts: Counter[str] = self.rendering.counts  # one counter: the rendering adds to it as well

    def encode(self, record: CandidateSet) -> TokenList | None:
        """One record; None (counted as ``dropped_prompts``) where no candidate is left.

        Raises:
            RecordError: the model's chat template refuses it.
        """
        chosen = [(self.answer(response), score, response) for response, score in self._select(record)]
        kept = [each for each in chosen if _says(each[0])]
        self.counts["empty"] += len(chosen) - len(kept)
        if kept:
            prompt, written = self._fitted(record, [answer for answer, _, _ in kept])
            axes = [self._on_axes(response) or [] for _, _, response in kept] if self.options.axes else []
            own = [is_own(response) for _, _, response in kept]
            tokens = _list(record.id, prompt, written, [score for _, score, _ in kept], axes, own)
            self._add("all_masked", len(kept) - len(tokens.responses))
        if not kept or not tokens.responses:
            self.counts["dropped_prompts"] += 1
            return None
        if record.meta.get("margin") is not None:
            self.counts["margin_unused"] += 1
        self._add("own_answers", sum(tokens.own))
        self._add("tokens_without_loss", sum(map(len, tokens.responses)) - sum(tokens.lengths))
        self._count(tokens.scores)
        return tokens

    def tokens(self, record: CandidateSet) -> tuple[list[int], list[list[int]]]:
        """Tokens of a record's prompt and of each of its responses, uncut.

        Raises:
            RecordError: the model's chat template refuses it.
        """
        prompt, written = self.written(record)
        return prompt, [answer.ids for answer in written]

    def written(self, record: CandidateSet) -> tuple[list[int], list[Written]]:
        """The same with the spans that get no loss."""
        return self._written(record, [self.answer(response) for response in record.responses])

    def fitted(self, record: CandidateSet, answers: Sequence[Answer]) -> tuple[list[int], list[list[int]]]:
        """Tokens of a record's prompt and of answers to it, cut to ``max_length`` by :func:`fit`; cuts are counted."""
        prompt, written = self._fitted(record, answers)
        return prompt, [answer.ids for answer in written]

    def _fitted(self, record: CandidateSet, answers: Sequence[Answer]) -> tuple[list[int], list[Written]]:
        prompt, written = self._written(record, answers)
        responses = [answer.ids for answer in written]
        short, cut = fit(
            prompt,
            responses,
            self.options.max_length,
            lambda ids, room: self.rendering.shortened(ids, room, record.prompt, record.meta),
        )
        self.counts["prompt_truncated"] += len(short) < len(prompt)
        self.counts["response_truncated"] += sum(len(a) < len(b) for a, b in zip(cut, responses, strict=True))
        return short, [Written(ids, clip(w.unlearned, len(ids))) for ids, w in zip(cut, written, strict=True)]

    def _written(self, record: CandidateSet, answers: Sequence[Answer]) -> tuple[list[int], list[Written]]:
        try:
            if self.options.whole:
                prompt, texts = self.rendering.whole(record.prompt, answers, record.meta)
                return prompt, [Written(text) for text in texts]
            return self.rendering.write(record.prompt, answers, record.meta)
        except RecordError:
            raise
        except InputError as error:
            raise refusal(record, "prompt", str(error)) from error

    def says(self, response: Response) -> bool:
        """Whether a response says anything; one that does not is left out."""
        return _says(self.answer(response))

    def response(self, response: Response) -> list[int]:
        """Tokens of one response behind a prompt of one message: those it was sampled with where the tokenizer is the
        same, else its text encoded; the token that ends its turn only if it finished."""
        return self.rendering.answers(NEUTRAL, [self.answer(response)])[1][0]

    def answer(self, response: Response) -> Answer:
        """A response as it is to be encoded, cut at the marks of HH where that is asked for."""
        answer = self.rendering.answer(response)
        if not self.options.stop_response:
            return answer
        if answer.messages is not None:
            return answer  # messages have their own turns
        text, stopped = templates.cut_at_stop(response.text, templates.HH_STOPS)
        return Answer(text) if stopped else answer

    def _select(self, record: CandidateSet) -> list[tuple[Response, float]]:
        """The scored responses that the options ask for."""
        wanted, options = record.responses, self.options
        if options.only_use_provide:
            wanted = wanted[-2:]
        elif options.only_use_sample:
            wanted = wanted[:-2]
        self.counts["not_selected"] += len(record.responses) - len(wanted)
        scored = self._weighted(wanted) or [(r, s) for r in wanted if (s := self._score(r)) is not None]
        self.counts["unscored"] += len(wanted) - len(scored)
        kept = spread(scored, options.max_candidates)
        self.counts["not_selected"] += len(scored) - len(kept)
        return kept

    def _weighted(self, wanted: Sequence[Response]) -> list[tuple[Response, float]]:
        """The responses that all of several judges scored, by their weights; none where one judge ranks."""
        if not self.weights:
            return []
        whole = [r for r in wanted if all(r.scores.get(name) is not None for name in self.weights)]
        table = [[s for name in self.weights if (s := r.scores[name]) is not None] for r in whole]
        return list(zip(whole, combined(table, self.weights), strict=True))

    def _score(self, response: Response) -> float | None:
        if not self.options.axes:
            return response.scores.get(self.options.judge)
        values = self._on_axes(response)
        return None if values is None else sum(values) / len(values)

    def _on_axes(self, response: Response) -> list[float] | None:
        """A response's scores by axis; None where one is missing."""
        values = [response.scores.get(axis) for axis in self.options.axes]
        there = [value for value in values if value is not None]
        return there if len(there) == len(values) else None

    def _add(self, name: str, count: int) -> None:
        if count:
            self.counts[name] += count

    def _count(self, scores: list[float]) -> None:
        pairs = len(scores) * (len(scores) - 1) // 2
        tied = sum(a == b for i, a in enumerate(scores) for b in scores[:i])
        self.counts.update(prompts=1, candidates=len(scores), pairs=pairs - tied, tied_pairs=tied)


def _says(answer: Answer) -> bool:
    return bool(answer.text.strip() or answer.drawn or any(map(_holds, answer.messages or ())))


def _holds(message: messages.Message) -> bool:
    return bool(messages.text_of(message).strip() or messages.said(message, messages.MESSAGE_FIELDS))


def _list(
    ident: str,
    prompt: list[int],
    written: Sequence[Written],
    scores: Sequence[float],
    axes: Sequence[list[float]],
    own: Sequence[bool],
) -> TokenList:
    """The candidates of which anything is learned."""
    kept = [i for i, answer in enumerate(written) if answer.learned or not answer.ids]
    spans = [written[i].unlearned for i in kept]
    return TokenList(
        ident,
        prompt,
        [written[i].ids for i in kept],
        [scores[i] for i in kept],
        [axes[i] for i in kept] if axes else [],
        spans if any(spans) else [],
        [own[i] for i in kept] if any(own) else [],
    )


def spread(scored: list[tuple[Response, float]], limit: int) -> list[tuple[Response, float]]:
    """At most ``limit`` candidates, evenly over the ranking with best and worst among them, in their first order."""
    if not limit or len(scored) <= limit:
        return scored
    order = sorted(range(len(scored)), key=lambda i: -scored[i][1])
    step = (len(scored) - 1) / max(limit - 1, 1)
    keep = {order[round(i * step)] for i in range(limit)}
    return [scored[i] for i in sorted(keep)]


def encode_all(
    sets: Iterable[CandidateSet],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    on_error: OnError | None = None,
) -> tuple[list[TokenList], dict[str, int]]:
    """All records as token lists, with the counts of :class:`Encoder`.

    Args:
        sets: the records.
        tokenizer: the model's.
        options: how.
        on_error: takes the error of each record that the model's chat template refuses, which is then left out;
            without it the first one raises.
    """
    encoder, report, lists = Encoder(tokenizer, options), on_error or give_up, []
    for record in sets:
        try:
            tokens = encoder.encode(record)
        except RecordError as error:
            report(error)
        else:
            lists += [] if tokens is None else [tokens]
    return lists, dict(encoder.counts)
