"""Decoding in memory of fixed size: each step does the same work at the same addresses, so that a GPU can replay it.

The prompts are computed as ever, with a cache that grows. Before the first token goes in, keys and values move into
tensors with room for more positions; a step then writes one position in place, and what is not written yet is masked.
When the room is used up, or half of the rows have ended, the tensors are made anew: a text meets few sizes, and a CUDA
graph (:mod:`rankalign.engines.graphs`) is made once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from rankalign.engines.decode import DAMAGED, Rows, alike
from rankalign.engines.graphs import Replayed
from rankalign.errors import InputError
from rankalign.models.devices import is_over_devices
from rankalign.rows.attention import PREFIX

GRAIN = 64
"""Positions that a cache has room for come in multiples of this."""
AHEAD = 128
"""It has room for so many more than it holds, or for half as many again."""
FEWEST = 8
"""A batch of no more rows keeps its size: a GPU takes as long for one."""
WORTH = 16
"""Shortest limit of new tokens that a graph is made for unasked: making one takes as long as two steps without."""

_TRIED = "_rankalign_static"
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
_KINDS = {"full_attention", "sliding_attention"}


def rounded(tokens: int) -> int:
    """The most positions that a row of so many tokens takes."""
    return -(-tokens // GRAIN) * GRAIN


def room(need: int, most: int) -> int:
    """Positions of a cache that is to hold ``need`` of them now, and at last ``most``."""
    return min(rounded(need + max(AHEAD, need // 2)), rounded(max(need, most)))


class FixedLayer(CacheLayerMixin):
    """Keys and values of all positions that there is room for; a new one is written where ``slot`` says.

    A sliding window is the mask's affair: every position is kept.

    Args:
        keys: (R, heads, L, width).
        values: like ``keys``, heads may be of another size.
        slot: (1,) the position that the next token takes; shared by all layers, and moved by their owner.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.slot, self.length = slot, slot[0]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to make."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (R, heads, 1, width) keys and values; return those of all positions, (R, heads, L, width)."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions a mask covers, and the first of them."""
        assert self.keys is not None
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> Any:
        """Positions written, a () tensor: asking for the number would wait for the device."""
        return self.length

    def get_max_length(self) -> int:
        """Positions that there is room for."""
        assert self.keys is not None
        return int(self.keys.shape[-2])


@dataclass
class _Held:
    """What a step reads and writes, each at an address of its own that stays.

    Attributes:
        cache: with room for L positions of R rows.
        mask: (R, L), 1 where a position was written and is no padding.
        slot: (1,) the position that the next token takes.
        ids: (R, 1) next tokens.
        positions: (R, 1) theirs, counted from the text's own beginning.
        going: (R, 1), 1 for rows that go on; the others compute what nobody reads.
        logits: (R, V) of the tokens after them.
        finite: () whether all logits so far were numbers, of rows that went on.
    """

    cache: Cache
    mask: Tensor
    slot: Tensor
    ids: Tensor
    positions: Tensor
    going: Tensor
    logits: Tensor
    finite: Tensor


class StaticRows(Rows):
    """As :class:`rankalign.engines.decode.Rows`, in memory of fixed size; ``logits`` are overwritten by the next step.

    Args:
        model: as for that, and without an obstacle, see :func:`obstacle`.
        prompts: as for that.
        limit: most tokens that will be written to each.
        graph: replay the steps as a CUDA graph; the model lies on a GPU then.

    Attributes:
        replayed: the graph of the present sizes, from the first step on.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], limit: int, graph: bool) -> None:
        super().__init__(model, prompts)
        self._filled = self._mask.shape[1]
        self._most = self._filled + limit
        self._graph = graph
        self._held: _Held | None = None
        self._places: list[int] = []  # of the rows that go on, among those held
        self._at: Tensor | None = None  # the same on the device, None for all
        self.replayed: Replayed | None = None

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or reorder: row i becomes what row ``rows[i]`` was. Rows that are left out stay in memory until
        half of all have been."""
        held = self._held
        if held is None:
            super().select(rows)
            return
        if list(rows) == list(range(len(self._places))):
            return
        places = [self._places[row] for row in rows]
        fewer = 2 * len(places) <= len(held.ids) > FEWEST
        if fewer or places != sorted(set(places)):
            self._hold(places, held.mask.shape[1])
        else:
            self._places, self._at = places, torch.tensor(places, device=held.ids.device)
            held.going.zero_().index_fill_(0, self._at, 1)
        self._show()

    @torch.inference_mode()
    def append(self, tokens: Tensor) -> None:
        """Put one token behind each row and compute the next logits; ``tokens`` is (R,).

        Raises:
            InputError: the logits are no numbers, on a CPU; on a GPU :meth:`told` tells.
        """
        if self._held is None:
            self._hold(range(len(self._mask)), room(self._filled + 1, self._most))
        elif self._filled == self._held.mask.shape[1]:
            self._hold(self._places, room(self._filled + 1, self._most))
        held = self._held
        assert held is not None
        fresh = tokens.to(held.ids.device)[:, None]
        if self._at is None:
            held.ids.copy_(fresh)
        else:
            held.ids.index_copy_(0, self._at, fresh)
        if self.replayed is None:
            self._step()
        else:
            self.replayed(self._step)
        self._filled += 1
        if held.ids.device.type != "cuda" and not bool(held.finite):
            raise InputError(DAMAGED)
        self._show()

    def _step(self) -> None:
        held = self._held
        assert held is not None
        held.mask.index_fill_(1, held.slot, 1)
        # Under autocast too: in inference mode it keeps no casts of weights, which a graph would go on reading.
        logits = self._compute(held.ids, held.positions, held.mask, held.cache)
        held.logits.copy_(logits)
        idle = held.going[:, 0] == 0
        held.finite.logical_and_((logits.amax(dim=-1).isfinite() | idle).all())
        held.slot.add_(1)
        held.positions.add_(held.going)

    def _show(self) -> None:
        held = self._held
        assert held is not None
        self.logits = held.logits if self._at is None else held.logits.index_select(0, self._at)

    def _hold(self, places: Sequence[int], length: int) -> None:
        """Make what a step reads and writes, from what there is: some of its rows, with room for ``length``."""
        old, filled = self._held, self._filled
        mask, logits = (self._mask, self.logits) if old is None else (old.mask, old.logits)
        self.replayed = None  # and with it what the old graph has reserved
        device = mask.device
        index = None if list(places) == list(range(len(mask))) else torch.tensor(places, device=device)
        slot = torch.tensor([filled], device=device)
        cache = self._cache if old is None else old.cache
        for number, layer in enumerate(cache.layers):  # one after the other, so that one alone is there twice
            cache.layers[number] = _fixed(layer, index, filled, length, slot)
        fresh = mask.new_zeros(len(places), length)
        fresh[:, :filled] = _taken(mask[:, :filled], index)
        positions = fresh.sum(dim=-1, keepdim=True)
        finite = self._finite if self._finite is not None else torch.ones((), dtype=torch.bool, device=device)
        self._held = _Held(
            cache=cache,
            mask=fresh,
            slot=slot,
            ids=torch.zeros_like(positions),
            positions=positions,
            going=torch.ones_like(positions),
            logits=_taken(logits, index).clone(),
            finite=finite.clone(),
        )
        self._places, self._at = list(range(len(places))), None
        self._finite = self._held.finite if device.type == "cuda" else None
        self.replayed = Replayed() if self._graph else None


def _fixed(layer: Any, index: Tensor | None, filled: int, length: int, slot: Tensor) -> Any:
    """The layer of a cache with rows chosen and room for ``length`` positions; one that holds nothing stays."""
    if layer.keys is None:
        return layer
    # A window that slides has let go of what lies behind it, which the mask hides as well.
    keys, values = (_wide(_taken(part[..., :filled, :], index), filled, length) for part in (layer.keys, layer.values))
    return FixedLayer(keys, values, slot)


def _wide(part: Tensor, filled: int, length: int) -> Tensor:
    wide = part.new_zeros(*part.shape[:2], length, part.shape[-1])
    wide[..., filled - part.shape[-2] : filled, :] = part
    return wide


def _taken(part: Tensor, index: Tensor | None) -> Tensor:
    return part if index is None else part.index_select(0, index)


# --- who can ------------------------------------------------------------------------------------------------------


def obstacle(model: Any, base: Any, graph: bool) -> str:
    """Why a model's steps cannot be done in memory of fixed size, or with ``graph`` cannot be replayed; empty where
    they can. It is tried on two short texts, once for a model.

    Args:
        model: a causal language model, bare or inside PEFT.
        base: the transformers model in it.
        graph: whether as a CUDA graph.
    """
    found = _by_kind(base) or ("a CUDA graph needs a GPU" if graph and base.device.type != "cuda" else "")
    if found:
        return found
    tried: dict[bool, str] = vars(base).setdefault(_TRIED, {})
    if graph not in tried:
        tried[graph] = _trial(model, base, graph)
    return tried[graph]


def _by_kind(base: Any) -> str:
    text: Any = base.config.get_text_config(decoder=True)
    layers = {type(layer).__name__ for layer in DynamicCache(config=base.config).layers}
    kinds = set(getattr(text, "layer_types", None) or ()) - _KINDS
    kernel = str(text._attn_implementation).removeprefix(PREFIX)
    odd = sorted(kinds | (layers - set(_LAYERS)))
    problems = {
        f"transformers runs {type(base).__name__} with no static cache": not base._can_compile_fullgraph,
        f"its cache has layers of another kind ({', '.join(odd)})": bool(odd),
        "it attends in chunks": getattr(text, "attention_chunk_size", None) is not None,
        f"attention {kernel!r} takes no mask for it": kernel not in ("sdpa", "eager"),
        "it lies on several devices": is_over_devices(base),
        "its weights are sharded": any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in base.parameters()),
    }
    return next((problem for problem, there in problems.items() if there), "")


def _trial(model: Any, base: Any, graph: bool) -> str:
    """Three steps of two short texts beside those of a cache that grows."""
    size = base.config.get_text_config().vocab_size
    ids = [1 + (size - 2) * i // 13 for i in range(13)]
    prompts, following = [ids[:5], ids[5:7]], torch.tensor(ids[7:]).view(3, 2)
    try:
        rows, grown = StaticRows(model, prompts, 4, graph), Rows(model, prompts)
        for tokens in following.to(base.device):
            rows.append(tokens)
            grown.append(tokens)
            if not alike(rows.logits, grown.logits):
                return "it gives other logits so"
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, InputError) as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return rows.replayed.refused if rows.replayed else ""
