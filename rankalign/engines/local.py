"""What engines that hold the model themselves have in common: prompts into tokens, tokens into responses."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankalign.data import templates
from rankalign.data.calls import with_calls
from rankalign.data.encode import said
from rankalign.data.messages import said as said_fields
from rankalign.data.records import CandidateSet, Response
from rankalign.data.render import Rendering
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.likeliest import merged
from rankalign.errors import InputError
from rankalign.models import load as models


class LocalEngine:
    """All of an engine but the model.

    Args:
        policy: model, adapter, template and sampling settings.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        templates.check_name(policy.template)
        self._reads: Rendering | None = None
        self._told = set[str]()
        self._stop = tuple(dict.fromkeys((*policy.sampling.stop, *templates.stops(policy.template))))

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return models.load_tokenizer(self.policy.model)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return models.tokenizer_fingerprint(self.tokenizer)

    @property
    def _copies(self) -> int:
        """How many answers a prompt are really written: greedy ones are all the same."""
        return 1 if self.policy.sampling.temperature == 0 else self.policy.sampling.n

    @property
    def _rendering(self) -> Rendering:
        policy = self.policy
        if self._reads is None:
            self._reads = Rendering(self.tokenizer, policy.template, policy.system, policy.allow_special_in_text)
        return self._reads

    def check(self, prompt: CandidateSet) -> None:
        """Read a prompt without answering it.

        Raises:
            RecordError: the template refuses it.
        """
        Rendering(self.tokenizer, self.policy.template, self.policy.system).prompt_of(prompt)

    def _encode(self, prompt: CandidateSet) -> list[int]:
        return self._rendering.prompt_of(prompt)

    @property
    def _turn_end(self) -> set[int]:
        """The token that ends a turn under the template, which a generation config may leave out."""
        end = self._rendering.end_id()
        return set() if end is None else {end}

    def _lengths(self, prompts: Sequence[CandidateSet]) -> list[int]:
        """How long the prompts of a run are; what is to be said of how they were read is said here, once."""
        lengths = [len(self._encode(prompt)) for prompt in prompts]
        counts = {name: n for name, n in self._rendering.counts.items() if name not in self._told}
        self._told.update(counts)
        for sentence in said(counts):
            print(f"policy {self.policy.name!r}: {sentence}", file=sys.stderr)
        return lengths

    def _check_context(self, prompts: Sequence[CandidateSet], ids: Sequence[list[int]], limit: int | None) -> None:
        new = self.policy.sampling.max_new_tokens
        for prompt, tokens in zip(prompts, ids, strict=True):
            if limit and len(tokens) + new > limit:
                raise InputError(
                    f"policy {self.policy.name!r}: prompt {prompt.id!r} has {len(tokens)} tokens, which with "
                    f"max_new_tokens {new} exceeds the model's context of {limit}"
                )

    def _response(
        self,
        ids: list[int],
        ended: bool,
        index: int,
        end: int | None = None,
        likeliest: Sequence[Sequence[tuple[int, float]]] = (),
    ) -> Response:
        """What was written as a response; tokens go with it where they say exactly what its text says.

        Args:
            ids: the answer's tokens, less one that ended it.
            ended: whether it ended by itself.
            index: its place among the prompt's answers.
            end: the token that ended it, if one did; it is kept where another could stand in its place.
            likeliest: for each of its tokens the likeliest ones with their log-probabilities, where they are kept.
        """
        text, cut = templates.cut_at_stop(decoded(self.tokenizer, ids), self._stop)
        kept = self._prefix(ids, text) if cut else ids
        # Training puts that one there by itself.
        usual = {self._rendering.end_id(), self.tokenizer.eos_token_id} == {end}
        last = {} if end is None or cut or usual else {"end": end}
        return Response(
            text=text,
            policy=self.policy.name,
            finished=ended or cut,
            sampling=_provenance(self.policy.sampling, index),
            tokens=None if kept is None else {"tokenizer": self._fingerprint, "ids": kept, **last},
            meta={"logprobs": self._told_logprobs(ids, likeliest)} if likeliest else {},
        )

    def _told_logprobs(self, ids: Sequence[int], likeliest: Sequence[Sequence[tuple[int, float]]]) -> list[Any]:
        """The log-probabilities in texts; tokens that read the same share theirs."""
        text = functools.cache(lambda token: decoded(self.tokenizer, [token]))
        return [
            {"token": text(token), "top": merged((text(other), value) for other, value in top)}
            for token, top in zip(ids, likeliest, strict=False)  # that of the token that ended it stays out
        ]

    def _with_calls(self, prompts: Sequence[CandidateSet], answers: list[list[Response]]) -> list[list[Response]]:
        """Answers to prompts that offer tools, with their calls as messages where those say what was written."""
        policy = self.policy
        for prompt, row in zip(prompts, answers, strict=True):
            if said_fields(prompt.meta, ("tools",)):
                reads = Rendering(self.tokenizer, policy.template, policy.system, policy.allow_special_in_text)
                row[:] = [with_calls(reads, prompt, response) for response in row]
        return answers

    def _prefix(self, ids: list[int], text: str) -> list[int] | None:
        """The first tokens whose text is ``text``, if any: a stop string may begin, or a cut fall, inside a token."""
        lengths = range(len(ids) + 1)
        return next((ids[:length] for length in lengths if decoded(self.tokenizer, ids[:length]) == text), None)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids without special tokens, blanks as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _provenance(params: SamplingParams, index: int) -> dict[str, Any]:
    """How an answer was drawn: temperature and seed (for beams, their settings), and all that is not default."""
    default = SamplingParams()
    told: dict[str, Any] = {} if params.num_beams > 1 else {"temperature": params.temperature, "seed": params.seed}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if field.name != "n" and value != getattr(default, field.name):
            told[field.name] = list(value) if isinstance(value, tuple) else value
    return {**told, "max_new_tokens": params.max_new_tokens, "index": index}
