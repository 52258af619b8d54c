"""The decode loop: a prompt is computed once for all its answers, and finished rows leave the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rankalign.engines import SamplingParams
from rankalign.engines.local import decoded
from rankalign.engines.sampling import drawn
from rankalign.errors import InputError
from rankalign.models.caches import cache_name
from rankalign.rows.attention import PREFIX
from rankalign.rows.linears import fast_linears
from rankalign.rows.norms import fuse_norms
from rankalign.rows.trunk import ATTENTION
from rankalign.rows.verdict import verdict_of

SPARE = 64
"""Positions by which the room of a cached layer grows; the library's own layer copies itself at every token."""


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A key-value cache layer with room behind its last position, so that a step writes one position and copies none.

    ``keys`` and ``values`` are (R, heads, T, width) views into ``rooms``.
    """

    rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (R, heads, t, width) keys and values; return all of them."""
        have = self.get_seq_length()
        need = have + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.rooms is None or self.rooms[0].shape[-2] < need:
            self.rooms = _room(self.keys, have, key_states), _room(self.values, have, value_states)
        keys, values = self.rooms
        keys[..., have:need, :] = key_states
        values[..., have:need, :] = value_states
        self.keys, self.values = keys[..., :need, :], values[..., :need, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep, repeat or reorder rows."""
        # The rows are chosen into tensors of their own, no longer views into the room.
        super().reorder_cache(beam_idx)
        self.rooms = None


def _roomy(layer: Any) -> Any:
    """A roomy layer for a plain one; sliding-window and recurrent layers are of fixed size and stay what they are."""
    return RoomyLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]


def _room(old: Tensor | None, have: int, new: Tensor) -> Tensor:
    """Space for the ``have`` positions of ``old``, which are copied, those of ``new``, and some more."""
    rows, heads, length, width = new.shape
    room = new.new_empty(rows, heads, have + length + SPARE, width)
    if old is not None and have:
        room[..., :have, :] = old
    return room


DAMAGED = "the model's logits are not finite: its weights are damaged or need a wider dtype"


def _takes_whole_mask(base: Any) -> bool:
    """Whether what a new token sees is the same in every layer, and may be handed on as (R, 1, 1, T), as it is.

    transformers else asks the device at every token whether there is padding at all.
    """
    text = base.config.get_text_config()
    alike = set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(text, "sliding_window", None) is not None or not alike
    kernel = str(text._attn_implementation).removeprefix(PREFIX)
    return not windowed and kernel == "sdpa" and verdict_of(base).way == ATTENTION


_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a logit's size; wider for narrower types


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute the same (R, V) logits agree but for rounding."""
    tolerance = _ROUNDING.get(expected.dtype, 0.05)
    return float((found - expected).abs().mean()) <= tolerance * float(expected.abs().mean())


class Rows:
    """Texts in the making, one a row: what the model remembers of them, and its logits for their next tokens.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids, none empty; the rows to begin with, padded on the left and computed in one pass.

    Attributes:
        logits: (R, V) of each row's next token.

    Raises:
        InputError: the model keeps no cache that rows can be taken out of, or its logits are no numbers.
    """

    _finite: Tensor | None = None  # on a GPU, whether all logits so far were numbers: known once something is read

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        adapted: Any = model
        base = adapted.get_base_model() if hasattr(model, "get_base_model") else adapted
        self._accepted = set(inspect.signature(base.forward).parameters)
        self._memory = cache_name(base)
        if self._memory is None:
            raise InputError(f"engine 'hf' cannot decode with {type(base).__name__}: it has no key-value cache")
        self._model = adapted
        self._one_column = base.device.type == "cuda" and _takes_whole_mask(base)
        if base.device.type == "cuda":
            fuse_norms(base)
        self._cache: Any = DynamicCache(config=base.config)
        self._cache.layers = [_roomy(layer) for layer in self._cache.layers]
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self._mask = torch.zeros_like(ids)
        # On the left, so that the next tokens of all rows stand in one column.
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, longest - len(prompt) :] = 1
        self._mask = self._mask.to(base.device)
        # Positions count from a text's own beginning, not from the batch's left edge.
        self.logits = self._forward(ids.to(base.device), (self._mask.cumsum(dim=-1) - 1).clamp(min=0))

    @torch.inference_mode()
    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits = self._compute(ids, positions, self._mask, self._cache)
        finite = logits.amax(dim=-1).isfinite().all()
        if logits.is_cuda:  # asking now would stop the host until the device is done
            self._finite = finite if self._finite is None else self._finite & finite
        elif not bool(finite):
            raise InputError(DAMAGED)
        return logits

    def _compute(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """(R, V) logits behind the last of (R, t) tokens at these positions, with what the cache holds before them."""
        # Of a prompt only the last position is drawn from: logits of all would be the largest tensor by far.
        extra = {"position_ids": positions, "logits_to_keep": 1, self._memory: cache}
        with fast_linears(self._model, None):
            logits: Tensor = self._model(
                input_ids=ids,
                attention_mask=mask.bool()[:, None, None] if self._one_column and ids.shape[1] == 1 else mask,
                use_cache=True,
                **{name: value for name, value in extra.items() if name in self._accepted},
            ).logits[:, -1]
        return logits

    def told(self, numbers: Tensor) -> list[Any]:
        """(n,) numbers on the host: the one time in a step that it waits for a GPU.

        Raises:
            InputError: some logits since the rows began were no numbers.
        """
        if self._finite is None:
            return numbers.tolist()
        *found, finite = torch.cat([numbers, self._finite.to(numbers.dtype)[None]]).tolist()
        if not finite:
            raise InputError(DAMAGED)
        return found

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or reorder: row i becomes what row ``rows[i]`` was."""
        if list(rows) == list(range(len(self._mask))):
            return
        index = torch.tensor(rows, device=self._mask.device)
        self._cache.reorder_cache(index)
        self._mask, self.logits = self._mask.index_select(0, index), self.logits.index_select(0, index)

    def append(self, tokens: Tensor) -> None:
        """Put one token behind each row and compute the next logits; ``tokens`` is (R,)."""
        positions = self._mask.sum(dim=-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(positions)], dim=-1)
        self.logits = self._forward(tokens.unsqueeze(-1).to(self._mask.device), positions)


class Ending:
    """Tells whether the token just written ends an answer: an end-of-sequence token, or a stop string now complete.

    Args:
        tokenizer: turns ids into text.
        eos: ids that end an answer.
        stop: strings that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: set[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.eos, self.stop = tokenizer, eos, tuple(stop)
        # A token writes at least one byte, so a stop string reaches back over no more tokens than it has bytes.
        self._window = max((len(mark.encode()) for mark in self.stop), default=0) + 1

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether an answer of these token ids, the last of them new, has ended."""
        return ids[-1] in self.eos or (bool(self.stop) and self._stopped(ids))

    def _stopped(self, ids: Sequence[int]) -> bool:
        tail = self.text(ids[-self._window :])
        return any(mark in tail for mark in self.stop)

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens, blanks as they are."""
        return decoded(self.tokenizer, ids)


Seen = Callable[[Sequence[int], Tensor], None]
"""Takes the answers that a step goes on with, by their number, and the (R, V) logits of their next tokens."""


def sample(
    rows: Rows, params: SamplingParams, uniforms: Tensor, ends: Ending, seen: Seen | None = None
) -> list[tuple[list[int], bool]]:
    """Write one answer a row, token by token.

    Args:
        rows: the answers' prompts; used up.
        params: how to draw; ``max_new_tokens`` is the limit.
        uniforms: (R, max_new_tokens) the random numbers of each row.
        ends: tells when an answer is complete.
        seen: is shown the logits of every step.

    Returns:
        For each row its token ids, a closing end-of-sequence token included, and whether it ended by itself.
    """
    *_, answers = stream(rows, params, uniforms, ends, seen)
    return answers


def stream(
    rows: Rows, params: SamplingParams, uniforms: Tensor, ends: Ending, seen: Seen | None = None
) -> Iterator[list[tuple[list[int], bool]]]:
    """What :func:`sample` returns, as it stands after every token."""
    answers: list[list[int]] = [[] for _ in uniforms]
    uniforms = uniforms.to(rows.logits.device)
    alive = list(range(len(answers)))
    for step in range(params.max_new_tokens):
        if seen is not None:
            seen(alive, rows.logits)
        tokens, told = _next(rows, params, uniforms[:, step])
        for row, token in zip(alive, told, strict=True):
            answers[row].append(token)
        going = [place for place, row in enumerate(alive) if not ends(answers[row])]
        left = len(going) < len(alive)
        alive = [alive[place] for place in going]
        yield [(ids, row not in alive) for row, ids in enumerate(answers)]
        if not alive or step == params.max_new_tokens - 1:
            return
        if left:  # nothing goes up to a GPU while all rows go on
            rows.select(going)
            index = torch.tensor(going, device=tokens.device)
            tokens, uniforms = tokens.index_select(0, index), uniforms.index_select(0, index)
        rows.append(tokens)


def _next(rows: Rows, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, list[int]]:
    """(R,) next tokens, and the same on the host."""
    tokens, whole = drawn(rows.logits, params, uniforms)
    if whole is None:
        return tokens, rows.told(tokens)
    *told, enough = rows.told(torch.cat([tokens, whole.to(tokens.dtype)[None]]))
    if enough:
        return tokens, told
    # A nucleus wider than what was sorted: seldom, and only the host can choose to sort all.
    tokens, _ = drawn(rows.logits, params, uniforms, sort_all=True)
    return tokens, rows.told(tokens)
