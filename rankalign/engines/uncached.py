"""Decoding without a memory: every token runs its whole text again, one row at a time.

Slow, and right for every model: those that keep no key-value cache, keep one of their own, count positions from the
left edge of the batch, or turn their positions by the length of the longest text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankalign.engines.decode import Rows, alike
from rankalign.engines.static import WORTH, StaticRows, obstacle
from rankalign.errors import InputError
from rankalign.rows.positions import forget_longer, reach
from rankalign.rows.verdict import verdict_of

_BATCHES = "_rankalign_batches"
_TOLD = "_rankalign_told"


def rows_of(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], limit: int, decoding: str = "auto", search: bool = False
) -> Rows:
    """Texts in the making for these prompts.

    Args:
        model: as for :class:`rankalign.engines.decode.Rows`.
        prompts: as for that.
        limit: most tokens that will be written to each.
        decoding: as for :attr:`rankalign.engines.Policy.decoding`. Where what it asks for cannot be, the reason is
            said on stderr, once for a model, and the cache grows.
        search: whether rows will be repeated and reordered at every token, as in a beam search.
    """
    base = _base_of(model)
    own = reach(base)
    if own is not None and max(map(len, prompts)) + limit > own:
        _tell(base, decoding, "texts of this length turn their positions by it")
        return UncachedRows(model, prompts)
    if _BATCHES not in vars(base):
        # Kept with the model: tried once for all engines that share it.
        # What sees its path alone, by positions and masks that it is given, does so beside other texts as well.
        known = bool(verdict_of(base).way)
        setattr(base, _BATCHES, known or _decodes_in_batches(model, base))
        if not vars(base)[_BATCHES]:
            print(
                f"{type(base).__name__} cannot decode several texts from a cache as it does one: every token of every "
                "text is computed again, which is slow",
                file=sys.stderr,
            )
    if not vars(base)[_BATCHES]:
        return UncachedRows(model, prompts)
    graph = decoding == "graph" or (decoding == "auto" and base.device.type == "cuda" and limit >= WORTH)
    if not (graph or decoding == "static"):
        return Rows(model, prompts)
    against = "a beam search reorders its rows at every token" if search else obstacle(model, base, graph)
    if against:
        _tell(base, decoding, against)
        return Rows(model, prompts)
    return StaticRows(model, prompts, limit, graph)


def _tell(base: Any, decoding: str, against: str) -> None:
    """Say once why what a policy asks for cannot be."""
    told: set[str] = vars(base).setdefault(_TOLD, set())
    if decoding in ("static", "graph") and against not in told:
        told.add(against)
        print(f"decoding: {decoding} is not for {type(base).__name__} here: {against}; dynamic", file=sys.stderr)


class UncachedRows(Rows):
    """As :class:`rankalign.engines.decode.Rows`, computed from the whole texts at every step."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model: Any = model
        self._base = _base_of(model)
        self._texts = [tuple(prompt) for prompt in prompts]
        self.logits = self._all()

    @torch.inference_mode()
    def _all(self) -> Tensor:
        known = {text: self._one(text) for text in dict.fromkeys(self._texts)}
        logits = torch.stack([known[text] for text in self._texts])
        if not bool(logits.amax(dim=-1).isfinite().all()):
            raise InputError("the model's logits are not finite: its weights are damaged or need a wider dtype")
        return logits

    def _one(self, text: tuple[int, ...]) -> Tensor:
        forget_longer(self._base)  # some models turn positions by the longest text they have seen
        logits: Tensor = self._model(input_ids=torch.tensor([text], device=self._base.device), use_cache=False).logits
        return logits[0, -1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or reorder rows."""
        self._texts = [self._texts[row] for row in rows]
        self.logits = self.logits[torch.tensor(rows, device=self.logits.device)]

    def append(self, tokens: Tensor) -> None:
        """Put one token behind each row and compute the next logits; ``tokens`` is (R,)."""
        self._texts = [(*text, token) for text, token in zip(self._texts, tokens.tolist(), strict=True)]
        self.logits = self._all()


def _base_of(model: Any) -> Any:
    """The transformers model inside an adapter, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decodes_in_batches(model: PreTrainedModel, base: Any) -> bool:
    """Whether a short text beside a longer one, and the next token of each, get the logits that they get alone."""
    size = base.config.get_text_config().vocab_size
    ids = [1 + (size - 2) * i // 7 for i in range(8)]
    prompts, following = [ids[:5], ids[5:7]], torch.tensor([ids[7], ids[2]])
    try:
        rows = Rows(model, prompts)
        found = [rows.logits]
        rows.append(following)
        found.append(rows.logits)
    except (InputError, ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError):
        return False  # its cache is none, or of another kind
    alone = UncachedRows(model, prompts)
    expected = [alone.logits]
    alone.append(following)
    expected.append(alone.logits)
    return all(map(alike, found, expected))
