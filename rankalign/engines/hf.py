"""Answers by a transformers model in this process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankalign import batching, models, templates
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.beams import search
from rankalign.engines.decode import Ending, Rows, sample
from rankalign.engines.sampling import uniforms
from rankalign.errors import InputError
from rankalign.records import CandidateSet, Response

MAX_ROWS = 64
"""Most answers written at once. Twice as many would save a tenth of the time on a CPU, but progress is shown, and an
interrupted run resumes, by the batch."""
MAX_TOKENS = 32768
"""Most tokens, prompt and limit, that one batch may come to hold in its cache (1.5 GB for 135M weights in float32)."""


class HFEngine:
    """Writes answers with a causal language model: a prompt is computed once for all its answers.

    What an answer is depends on base seed, prompt id, policy name and its index alone, but for rounding: a matrix
    product may round differently when other rows stand beside it, which can turn a draw that falls within that rounding
    of the border between two tokens. The same list of prompts gives the same batches and so the same bytes.

    Args:
        policy: model, adapter, template and sampling settings.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        templates.check_name(policy.template)
        self._stop = tuple(dict.fromkeys((*policy.sampling.stop, *templates.stops(policy.template))))

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return models.load_tokenizer(self.policy.model)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        return models.load_policy(self.policy.model, dtype=self.policy.dtype, adapter=self.policy.adapter)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return models.tokenizer_fingerprint(self.tokenizer)

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Indices by falling prompt length, cut so that a batch keeps to MAX_ROWS and MAX_TOKENS (one prompt at least).

        The longest come first: what does not fit in memory or in the model's context fails before any work is done.
        """
        params = self.policy.sampling
        lengths = [len(self._encode(prompt)) + params.max_new_tokens for prompt in prompts]
        rows = max(params.num_beams, self._copies)
        found: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda i: -lengths[i]):
            room = min(MAX_ROWS, MAX_TOKENS // lengths[found[-1][0]]) if found else 0
            if found and (len(found[-1]) + 1) * rows <= room:
                found[-1].append(index)
            else:
                found.append([index])
        return found

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """Answer one batch.

        Raises:
            InputError: a prompt leaves no room for ``max_new_tokens`` in the model's context.
        """
        params = self.policy.sampling
        ids = [self._encode(prompt) for prompt in prompts]
        self._check_context(prompts, ids)
        rows = Rows(self.model, ids)
        ends = Ending(self.tokenizer, models.end_ids(self.model, self.tokenizer), self._stop)
        if params.num_beams > 1:
            found = search(rows, params, ends, len(ends.eos))
            return [[self._response(h.ids, h.ended, ends, i) for i, h in enumerate(beams)] for beams in found]
        return self._sample(rows, prompts, ends)

    @property
    def _copies(self) -> int:
        """How many answers a prompt are really written: greedy ones are all the same."""
        return 1 if self.policy.sampling.temperature == 0 else self.policy.sampling.n

    def _sample(self, rows: Rows, prompts: Sequence[CandidateSet], ends: Ending) -> list[list[Response]]:
        params, copies = self.policy.sampling, self._copies
        rows.select([row for row in range(len(prompts)) for _ in range(copies)])
        draws = [
            uniforms(params.seed, prompt.id, self.policy.name, index, params.max_new_tokens)
            for prompt in prompts
            for index in range(copies)
        ]
        answers = sample(rows, params, torch.stack(draws), ends)
        return [
            [self._response(*answers[row * copies + index % copies], ends, index) for index in range(params.n)]
            for row in range(len(prompts))
        ]

    def _encode(self, prompt: CandidateSet) -> list[int]:
        policy = self.policy
        return batching.encode_prompt(self.tokenizer, prompt.prompt, policy.template, policy.system, prompt.meta)

    def _check_context(self, prompts: Sequence[CandidateSet], ids: Sequence[list[int]]) -> None:
        config: Any = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        new = self.policy.sampling.max_new_tokens
        for prompt, tokens in zip(prompts, ids, strict=True):
            if limit and len(tokens) + new > limit:
                raise InputError(
                    f"policy {self.policy.name!r}: prompt {prompt.id!r} has {len(tokens)} tokens, which with "
                    f"max_new_tokens {new} exceeds the model's context of {limit}"
                )

    def _response(self, ids: list[int], ended: bool, ends: Ending, index: int) -> Response:
        """What was written as a response; tokens go with it where they say exactly what its text says."""
        ids = ids[:-1] if ids[-1] in ends.eos else ids
        text, cut = templates.cut_at_stop(ends.text(ids), self._stop)
        kept = _prefix(ids, text, ends) if cut else ids
        return Response(
            text=text,
            policy=self.policy.name,
            finished=ended or cut,
            sampling=_provenance(self.policy.sampling, index),
            tokens=None if kept is None else {"tokenizer": self._fingerprint, "ids": kept},
        )


def _prefix(ids: list[int], text: str, ends: Ending) -> list[int] | None:
    """The first tokens, if there are such, whose text is ``text``; a stop string may begin or a cut fall inside one."""
    lengths = range(len(ids) + 1)
    return next((ids[:length] for length in lengths if ends.text(ids[:length]) == text), None)


def _provenance(params: SamplingParams, index: int) -> dict[str, Any]:
    """How an answer was drawn: temperature and seed (for beams, their settings), and all that is not default."""
    default = SamplingParams()
    told: dict[str, Any] = {} if params.num_beams > 1 else {"temperature": params.temperature, "seed": params.seed}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if field.name != "n" and value != getattr(default, field.name):
            told[field.name] = list(value) if isinstance(value, tuple) else value
    return {**told, "max_new_tokens": params.max_new_tokens, "index": index}
