"""Rotary angles that depend on the longest text of a batch: dynamic NTK and longrope.

Both are chosen by the largest position in the batch, so a text's log-probs change with what stands beside it, and with
dynamic NTK with what ran before. Up to the length the model was first trained for, they do not; beyond it a text runs
by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_REACH = "_rankalign_reach"


def reach(lm: Any) -> int | None:
    """Up to how many tokens a text's angles are its own whatever runs beside it; None for any number."""
    if _REACH not in vars(lm):
        limits = [_limit(module, kind, layer) for module, kind, layer in _length_dependent(lm)]
        setattr(lm, _REACH, min(limits, default=None))
    found: int | None = vars(lm)[_REACH]
    return found


def forget_longer(lm: Any) -> None:
    """Undo what longer texts that ran before have done to the angles of dynamic NTK."""
    if reach(lm) is None:
        return
    for module, kind, layer in _length_dependent(lm):
        if "dynamic" in kind:  # a text of one token makes the module start anew
            device = next(module.buffers()).device
            one = torch.zeros(1, 1, dtype=torch.long, device=device)
            module(torch.zeros(1, device=device), one, **({"layer_type": layer} if layer else {}))


def _length_dependent(lm: Any) -> Iterator[tuple[Any, str, str]]:
    """Modules that make such angles, the kind, and the type of layers it is for, where there are several."""
    for module in lm.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds if isinstance(kinds, dict) else {"": kinds}
        yield from ((module, k, layer) for layer, k in named.items() if k and ("dynamic" in k or k == "longrope"))


def _limit(module: Any, kind: str, layer: str) -> int:
    if "dynamic" in kind:
        return int(module.original_max_seq_len)
    settings = module.config.rope_parameters
    return int((settings[layer] if layer else settings)["original_max_position_embeddings"])
