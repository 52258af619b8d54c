"""Answers by a transformers model in this process."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy
from rankalign.engines.beams import Ends, search
from rankalign.engines.decode import Ending, Rows, sample, stream
from rankalign.engines.local import LocalEngine
from rankalign.engines.mixture import MixedRows, Start
from rankalign.engines.sampling import uniforms
from rankalign.engines.static import rounded
from rankalign.engines.uncached import rows_of
from rankalign.errors import InputError
from rankalign.models import load as models

MAX_ROWS = 64
"""Most answers written at once on a CPU. Twice as many would save a tenth of the time, but progress is shown, and an
interrupted run resumes, by the batch."""
MAX_TOKENS = 32768
"""Most tokens, prompt and limit, that its cache may come to hold there (1.5 GB for 135M weights in float32)."""


MAX_ROWS_ON_GPU = 512  # from where on a step takes longer and a larger batch wins little
SHARE = 0.6  # of a GPU's memory beside the weights; a growing cache is copied, and prompts and logits take some too


def most(config: Any, weights: int, width: int) -> tuple[int, int]:
    """Most rows and most tokens of a batch, on a GPU by its memory.

    By the whole memory of the card and not by what is free now, so that a resumed run makes the same batches.

    Args:
        config: the model's.
        weights: bytes of its weights.
        width: bytes of a number in the cache.
    """
    if models.device().type != "cuda":
        return MAX_ROWS, MAX_TOKENS
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * size * width
    room = SHARE * (torch.cuda.mem_get_info()[1] - weights)
    return MAX_ROWS_ON_GPU, max(MAX_TOKENS, int(room / token))


class HFEngine(LocalEngine):
    """Writes answers with a causal language model: a prompt is computed once for all its answers.

    What an answer is depends on base seed, prompt id, policy name and its index alone, but for rounding: a matrix
    product may round differently when other rows stand beside it, which can turn a draw that falls within that rounding
    of the border between two tokens. The same list of prompts gives the same batches and so the same bytes.

    Args:
        policy: model, adapter, template and sampling settings.

    Raises:
        InputError: an unknown ``device_map``.
    """

    in_memory = False
    """Whether the model was handed in and not named: weights of the moment have no folder to be measured by."""

    start: Start | None = None
    """The start model of a run whose weights of the moment these are, for :attr:`Policy.start_share`."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        models.check_device_map(policy.device_map, f"policy {policy.name!r}")

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        told = self.policy
        return models.load_policy(told.model, dtype=told.dtype, adapter=told.adapter, device_map=told.device_map)

    def take(self, model: Any, tokenizer: Any, start: str, version: object) -> None:
        """Sample with a model that is in memory already.

        Args:
            model: in eval mode, bare or inside PEFT.
            tokenizer: its tokenizer.
            start: is not read, nor is ``version``: nothing is copied.
        """
        self.in_memory = True
        self.model, self.tokenizer = model, tokenizer  # in the place of what the properties would load

    def batches(self, prompts: Sequence[CandidateSet]) -> list[list[int]]:
        """Indices by falling prompt length, cut so that a batch keeps to :func:`most` (one prompt at least).

        The longest come first: what does not fit in memory or in the model's context fails before any work is done.
        """
        params = self.policy.sampling
        lengths = [self._held(length + params.max_new_tokens) for length in self._lengths(prompts)]
        rows = max(params.num_beams, self._copies)
        most_rows, most_tokens = self._most()
        found: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda i: -lengths[i]):
            # The first of a batch is its longest.
            room = min(most_rows, most_tokens // lengths[found[-1][0]]) if found else 0
            if found and (len(found[-1]) + 1) * rows <= room:
                found[-1].append(index)
            else:
                found.append([index])
        return found

    def _held(self, tokens: int) -> int:
        """Positions that the cache of a row of so many tokens comes to hold, where it is of fixed size."""
        decoding = self.policy.decoding
        grows = decoding == "dynamic" or (decoding == "auto" and models.device().type != "cuda")
        return tokens if grows else rounded(tokens)

    def _most(self) -> tuple[int, int]:
        if models.device().type != "cuda":
            return MAX_ROWS, MAX_TOKENS
        if self.in_memory:
            every = list(self.model.parameters())
            return most(self.model.config, sum(p.numel() * p.element_size() for p in every), every[0].element_size())
        folder = models.local_folder(models.base_and_adapter(self.policy.model, self.policy.adapter)[0])
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        width = models.pick_dtype(self.policy.dtype).itemsize
        return most(AutoConfig.from_pretrained(folder), weights, width)

    def generate(self, prompts: Sequence[CandidateSet]) -> list[list[Response]]:
        """Answer one batch.

        Raises:
            InputError: a prompt leaves no room for ``max_new_tokens`` in the model's context.
        """
        rows, ends = self._begin(prompts)
        if self.policy.sampling.num_beams > 1:
            return self._with_calls(prompts, self._search(rows, ends, ends))
        return self._with_calls(prompts, self._sample(rows, prompts, ends))

    def stream(self, prompt: CandidateSet, stopping: Callable[[], bool] = lambda: False) -> Iterator[Response]:
        """The first answer that :meth:`generate` gives to one prompt, again after every token, the whole one last.

        A beam search knows its answer only when it is done, and tells it once.

        Args:
            prompt: what to answer.
            stopping: asked after every token; True ends the answer there (a search then ends without one).
        """
        params = self.policy.sampling
        rows, ends = self._begin([prompt])
        if params.num_beams > 1:
            with contextlib.suppress(_Stopped):
                yield self._search(rows, ends, lambda ids: _unless(stopping) and ends(ids))[0][0]
            return
        draws = uniforms(params.seed, prompt.id, self.policy.name, 0, params.max_new_tokens)
        for [(ids, ended)] in stream(rows, params, draws.unsqueeze(0), ends):
            own, end = _bare(list(ids), ends.eos)
            yield self._response(own, ended, 0, end)
            if stopping():
                return

    def under(self, policy: Policy) -> HFEngine:
        """The same model, loaded once, under another template or other sampling settings."""
        other = copy.copy(self)
        LocalEngine.__init__(other, policy)  # template and stop strings anew, the loaded model kept
        return other

    def _begin(self, prompts: Sequence[CandidateSet]) -> tuple[Rows, Ending]:
        ids = [self._encode(prompt) for prompt in prompts]
        self._check_context(prompts, ids, self._context)
        ends = Ending(self.tokenizer, models.end_ids(self.model, self.tokenizer) | self._turn_end, self._stop)
        return self._rows(ids), ends

    def _rows(self, ids: Sequence[list[int]]) -> Rows:
        share, params = self.policy.start_share, self.policy.sampling
        how = params.max_new_tokens, self.policy.decoding, params.num_beams > 1
        if not share:
            return rows_of(self.model, ids, *how)
        if self.start is None:
            raise InputError(f"policy {self.policy.name!r}: start_share is a setting of `rankalign iterate`")
        return MixedRows(self.model, self.start, share, ids, *how)

    def _search(self, rows: Rows, ends: Ending, told: Ends) -> list[list[Response]]:
        """Answers by beam search; ``told`` is ``ends``, or asks something else as well."""
        found = search(rows, self.policy.sampling, told, len(ends.eos))
        written = [[(_bare(h.ids, ends.eos), h.ended) for h in beams] for beams in found]
        return [
            [self._response(ids, ended, i, end) for i, ((ids, end), ended) in enumerate(answers)] for answers in written
        ]

    def _sample(self, rows: Rows, prompts: Sequence[CandidateSet], ends: Ending) -> list[list[Response]]:
        params, copies = self.policy.sampling, self._copies
        rows.select([row for row in range(len(prompts)) for _ in range(copies)])
        draws = [
            uniforms(params.seed, prompt.id, self.policy.name, index, params.max_new_tokens)
            for prompt in prompts
            for index in range(copies)
        ]
        likeliest = Likeliest(params.logprobs, len(draws)) if params.logprobs else None
        found = sample(rows, params, torch.stack(draws), ends, likeliest)
        answers = [(_bare(ids, ends.eos), ended) for ids, ended in found]
        return [
            [
                self._response(ids, ended, index, end, likeliest.of[row * copies + index % copies] if likeliest else ())
                for index in range(params.n)
                for (ids, end), ended in [answers[row * copies + index % copies]]
            ]
            for row in range(len(prompts))
        ]

    @property
    def _context(self) -> int | None:
        """Most tokens of prompt and answer, where the model's configuration tells."""
        config: Any = self.model.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)


class Likeliest:
    """Keeps the log-probabilities of the likeliest tokens at every step of a batch.

    Args:
        most: how many a step.
        rows: answers of the batch.

    Attributes:
        of: by answer and step, ``(token id, log-probability)`` from the likeliest on.
    """

    def __init__(self, most: int, rows: int) -> None:
        self.most = most
        self.of: list[list[list[tuple[int, float]]]] = [[] for _ in range(rows)]

    def __call__(self, alive: Sequence[int], logits: torch.Tensor) -> None:
        """One step of the answers that go on, from their (R, V) logits."""
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        values, ids = wide.log_softmax(dim=-1).topk(min(self.most, logits.shape[-1]), dim=-1)
        for row, own, at in zip(alive, values.tolist(), ids.tolist(), strict=True):
            self.of[row].append(list(zip(at, own, strict=True)))


class _Stopped(Exception):
    """A search was told to stop."""


def _unless(stopping: Callable[[], bool]) -> bool:
    """True, or the end of the search."""
    if stopping():
        raise _Stopped
    return True


def _bare(ids: list[int], eos: set[int]) -> tuple[list[int], int | None]:
    """An answer's tokens without the one that ended it, and that one."""
    return (ids[:-1], ids[-1]) if ids[-1] in eos else (ids, None)
