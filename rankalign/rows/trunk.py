"""Rows through the trunk of a model, the part that makes hidden states of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankalign.rows.attention import install
from rankalign.rows.flash_varlen import prepare
from rankalign.rows.linears import fast_linears
from rankalign.rows.norms import fuse_norms
from rankalign.rows.recipes import bound_by_host, cheap_again
from rankalign.rows.tree import Forest, Rows
from rankalign.rows.upload import to_device

# How the layers of a model hear of the trees in a row: through the attention interface of transformers, or by a mask of
# the whole row, which is all that layers with an attention of their own take. Those of other models cannot.
ATTENTION, MASK, NEITHER = "attention", "mask", ""

COMPILED = "_rankalign_compiled"  # on a model whose layers torch traces, which cannot follow recipes and rows left out


def on_device(lm: Any, rows: Rows, way: str) -> Rows:
    """The rows where the model lies, with all that its layers will ask of them, in one copy."""
    device, parts = lm.device, (rows.ids, rows.positions, rows.predictors, rows.labels)
    if all(part.device == device for part in parts):
        return rows
    trees = rows.forest if device.type == "cuda" and way == ATTENTION else None
    sent: Sequence[Tensor]
    sent = prepare(trees, device, _windows(lm.config), parts)[1] if trees else to_device(device, *parts)
    return replace(rows, ids=sent[0], positions=sent[1], predictors=sent[2], labels=sent[3])


def run_trunk(lm: Any, trunk: Any, rows: Rows, way: str, embeddings: Tensor | None = None) -> Tensor:
    """(rows, tokens, hidden) last hidden states.

    Args:
        lm: the transformers model that the trunk is of, or the trunk.
        trunk: what runs.
        rows: its input, on its device.
        way: how its layers hear of trees; of a model for which that is ``NEITHER``, rows have none.
        embeddings: (rows, tokens, hidden) of the input tokens, where they have been looked up before.
    """
    forest = rows.forest
    tokens = {"input_ids": rows.ids} if embeddings is None else {"inputs_embeds": embeddings}
    if way:
        fuse_norms(lm)
    reached = forest if forest and torch.is_grad_enabled() and not forest.prefix else None
    # What is known of the models whose rows may be trees, in-place operations among it, is not known of others.
    slow = bound_by_host(lm, rows.positions.numel()) or hasattr(lm, COMPILED)
    again = cheap_again(lm, reached) if way and not slow else nullcontext()
    linears = nullcontext() if slow else fast_linears(lm, reached)
    extra: dict[str, Any] = {} if forest is None else _of_trees(lm, rows, forest, way)
    with linears, again:
        states: Tensor = trunk(**tokens, use_cache=False, **extra).last_hidden_state
    return states


def _of_trees(lm: Any, rows: Rows, forest: Forest, way: str) -> dict[str, Any]:
    """What a trunk is told of a row of trees."""
    if way == MASK:
        return {"attention_mask": forest.bias(lm.dtype, lm.device), "position_ids": rows.positions}
    install(lm.config)
    # A 4-D mask is handed on as it is, so the model builds none; attention reads the forest alone.
    mask = torch.zeros(1, 1, 1, 1, device=lm.device)
    return {"attention_mask": mask, "forest": forest, "position_ids": rows.positions}


def _windows(config: Any) -> list[int]:
    """Sliding windows of a model's layers."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return [window] if window else []
