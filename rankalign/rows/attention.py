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
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankalign.errors import InputError
from rankalign.rows.flash_cpu import path_attention
from rankalign.rows.flash_varlen import ragged_attention, takes_ragged
from rankalign.rows.flex import flex_attention, takes_flex
from rankalign.rows.masked import masked_attention
from rankalign.rows.tree import Forest

PREFIX = "rankalign_"

# Tensors among the keywords of attention functions that change nothing of what a token sees: layers have turned their
# keys by the positions already, and rows are told of by the forest.
HARMLESS = frozenset(("position_ids", "cache_position"))


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
        forest.attended += 1
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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of every token to its path through its tree.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, dim).
        key: (1, key heads, tokens, dim), where key heads divides heads.
        value: like ``key``, heads may be of another size.
        attention_mask: the placeholder that the model was given; the forest says it all.
        forest: the trees of the row.
        scaling: factor on the scores, 1 / sqrt(dim) by default.
        dropout: probability of dropping an attention weight.
        sliding_window: how many tokens of its path a token sees, itself included.
        softcap: cap of the scores, ``cap * tanh(score / cap)``.
        s_aux: (heads,) score of each head's sink, where it has one.
        **kwargs: what other attention functions read.

    Returns:
        (1, tokens, heads, dim of values).

    Raises:
        UnknownAttention: the layer asks for something else than attention to all of a path or the window of it.
    """
    _check(attention_mask, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    key, value = _with_prefix(module, key, value, forest)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    deep = sliding_window is not None and any(tree.depth > sliding_window for tree in forest.trees)
    window = sliding_window if deep else None
    if softcap and s_aux is None and not dropout and takes_flex(query):
        return flex_attention(query, key, value, forest, scaling, softcap, window)
    if not (softcap or dropout):
        wide = value.shape[-1]
        q, k, v = _of_one_size(query, key, value)
        if query.device.type == "cpu" and window is None:
            return path_attention(q, k, v, forest, scaling, s_aux)[..., :wide].contiguous()
        if takes_ragged(q, k, v):
            with torch._C.DisableTorchFunction():  # modes, of which nothing in there is a matter, cost a call each
                return ragged_attention(q, k, v, forest, scaling, window, s_aux)[..., :wide].contiguous()
    return masked_attention(query, key, value, forest, scaling, dropout, sliding_window, softcap, s_aux)


class UnknownAttention(InputError):
    """A layer's attention is of a kind that trees do not have."""


def _check(attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    """See that a layer brings no mask, bias or choice of keys of its own, which would be ignored."""
    if attention_mask is not None and attention_mask.numel() != 1:
        raise UnknownAttention("its layers make masks of their own")
    for name, value in others.items():
        if isinstance(value, Tensor) and name not in HARMLESS:
            raise UnknownAttention(f"its attention takes {name!r}, which is not known here")


def _of_one_size(*tensors: Tensor) -> Iterator[Tensor]:
    """Heads as wide as the widest, with zeros behind: what flash kernels want. Scores do not change by it."""
    wide = max(t.shape[-1] for t in tensors)
    return (t if t.shape[-1] == wide else pad(t, (0, wide - t.shape[-1])) for t in tensors)


def _with_prefix(module: nn.Module, key: Tensor, value: Tensor, forest: Forest) -> tuple[Tensor, Tensor]:
    """Keys and values with those of a prompt that is not in the row; the prompt's are stored where the forest asks."""
    if forest.prefix is not None:
        prompt_key, prompt_value = forest.prefix.cache[module]
        return torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2)
    if forest.record is not None:
        prompt = slice(*forest.trees[0].prompt)
        forest.record.cache[module] = key[:, :, prompt], value[:, :, prompt]
    return key, value
