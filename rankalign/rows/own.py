"""What a model itself makes of hidden states on the way to its logits: its forward around a trunk that returns them.

Language models do more to their hidden states than multiply them by a matrix: they transform, scale and cap them, each
family in its own way and under its own names. Where the head computed in chunks is not what the model computes, the
model computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class _States(ModelOutput):
    """The output of a trunk of which nothing but the last hidden states is known."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def trunk_of(lm: Any) -> Any:
    """The part of a causal language model, or of a classifier, that makes hidden states of tokens.

    Families that lie inside a larger model of pictures and text name that one's part as theirs, and so have none.
    """
    if lm.base_model is not lm:
        return lm.base_model
    decoder = lm.get_decoder()
    return lm.model if decoder is lm else decoder


def own_logits(lm: Any, states: Tensor) -> Tensor:
    """(positions, V) logits that the model makes of (positions, hidden) last hidden states; differentiable."""
    layer = lm.get_output_embeddings()
    ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    with ExitStack() as stack:
        for trunk in {trunk_of(lm), lm.get_decoder()} - {lm}:  # some reach past the first for the second
            stack.enter_context(replaced_forward(trunk, lambda *_, **__: _States(last_hidden_state=states[None])))
        if "forward" in vars(layer):  # another computation runs in its name
            stack.enter_context(replaced_forward(layer, partial(type(layer).forward, layer)))
        logits: Tensor = type(lm).forward(lm, input_ids=ids, use_cache=False).logits[0]
    return logits


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward in the place of a module's own; its hooks run as ever."""
    hidden = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if hidden is not None:
            module.forward = hidden
