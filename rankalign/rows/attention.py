"""Attention over tree rows, plugged into a model's own forward through the attention interface of transformers.

``install`` puts a dispatcher in the place of the model's attention function: with a ``forest`` among the keyword
arguments it attends along the trees, without one it calls the function that was there. The forest travels as an
argument through every layer, so gradient checkpointing hands it to the recomputation as well.

Which kernel: on a CPU flash attention by segments (:mod:`rankalign.rows.flash_cpu`); on a GPU, in 16 bits, two ragged
flash calls (:mod:`rankalign.rows.flash_varlen`), or FlexAttention where scores are capped (:mod:`rankalign.rows.flex`);
everything else by a mask (:mod:`rankalign.rows.masked`).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankalign.rows.flash_cpu import path_attention
from rankalign.rows.flash_varlen import ragged_attention, takes_ragged
from rankalign.rows.flex import flex_attention, takes_flex
from rankalign.rows.masked import masked_attention
from rankalign.rows.tree import Forest

PREFIX = "rankalign_"


def install(config: Any) -> None:
    """Let models of this configuration attend along trees; everything else they do stays as it was."""
    base = config._attn_implementation
    if base.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + base, partial(_dispatch, base))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = PREFIX + base


def _dispatch(base: str, module: nn.Module, *args: Any, forest: Forest | None = None, **kwargs: Any) -> Any:
    if forest is not None:
        return tree_attention(module, *args, forest=forest, **kwargs), None
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)(module, *args, **kwargs)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    forest: Forest,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of every token to its path through its tree.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, dim).
        key: (1, key heads, tokens, dim), where key heads divides heads.
        value: like ``key``.
        attention_mask: ignored, the forest says it all.
        forest: the trees of the row.
        scaling: factor on the scores, 1 / sqrt(dim) by default.
        dropout: probability of dropping an attention weight.
        sliding_window: how many tokens of its path a token sees, itself included.
        softcap: cap of the scores, ``cap * tanh(score / cap)``.
        **kwargs: what other attention functions read.

    Returns:
        (1, tokens, heads, dim).
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    key, value = _with_prefix(module, key, value, forest)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    deep = sliding_window is not None and any(tree.depth > sliding_window for tree in forest.trees)
    window = sliding_window if deep else None
    if softcap and not dropout and takes_flex(query):
        return flex_attention(query, key, value, forest, scaling, softcap, window)
    if not (softcap or dropout):
        if query.device.type == "cpu" and window is None:
            return path_attention(query, key, value, forest, scaling)
        if takes_ragged(query, key, value):
            with torch._C.DisableTorchFunction():  # modes, of which nothing in there is a matter, cost a call each
                return ragged_attention(query, key, value, forest, scaling, window)
    return masked_attention(query, key, value, forest, scaling, dropout, sliding_window, softcap)


def _with_prefix(module: nn.Module, key: Tensor, value: Tensor, forest: Forest) -> tuple[Tensor, Tensor]:
    """Keys and values with those of a prompt that is not in the row; the prompt's are stored where the forest asks."""
    if forest.prefix is not None:
        prompt_key, prompt_value = forest.prefix.cache[module]
        return torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2)
    if forest.record is not None:
        prompt = slice(*forest.trees[0].prompt)
        forest.record.cache[module] = key[:, :, prompt], value[:, :, prompt]
    return key, value
