"""Attention over tree rows, plugged into a model's own forward through the attention interface of transformers.

``install`` puts a dispatcher in the place of the model's attention function: with a ``forest`` among the keyword
arguments it attends along the trees, without one it calls the function that was there. The forest travels as an
argument through every layer, so gradient checkpointing hands it to the recomputation as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankalign.rows.tree import Forest, merged

PREFIX = "rankalign_"
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    windowed = sliding_window is not None and any(tree.depth > sliding_window for tree in forest.trees)
    if query.device.type == "cpu" and not (windowed or softcap or dropout):
        groups = key.shape[1]
        q = query.view(groups, -1, *query.shape[2:])
        k, v = (t.transpose(0, 1) for t in (key, value))
        return _path_attention(q, k, v, forest, scaling).flatten(0, 1).transpose(0, 1)[None]
    pieces = []
    for i, tree in enumerate(forest.trees):
        q, k, v = query[:, :, forest.queries(tree.span)], *(t[:, :, slice(*tree.span)] for t in (key, value))
        mask = forest.mask(i, sliding_window, query.device)[-q.shape[2] :]
        if softcap:
            pieces.append(_capped(q, k, v, mask, scaling, dropout, softcap))
        else:
            pieces.append(
                scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling, enable_gqa=True)
            )
    return torch.cat(pieces, 2).transpose(1, 2)


def _with_prefix(module: nn.Module, key: Tensor, value: Tensor, forest: Forest) -> tuple[Tensor, Tensor]:
    """Keys and values with those of a prompt that is not in the row; the prompt's are stored where the forest asks."""
    if forest.prefix is not None:
        prompt_key, prompt_value = forest.prefix.cache[module]
        return torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2)
    if forest.record is not None:
        prompt = slice(*forest.trees[0].prompt)
        forest.record.cache[module] = key[:, :, prompt], value[:, :, prompt]
    return key, value


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, dropout: float, softcap: float
) -> Tensor:
    """Attention with soft-capped scores, which no kernel of SDPA offers."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(query.dtype)
    return drop(weights, dropout) @ value


class _PathAttention(torch.autograd.Function):
    """Flash attention by segments: the prompt on itself, each response on itself and, all together, on the prompt.

    The two halves of a response are joined by their log-sum-exps. Backward runs the kernel's backward on each half with
    the joint output and log-sum-exp, which makes the halves' probabilities, and so the gradients, those of the whole.
    Queries are (key heads, queries per key head, tokens, dim), keys and values (key heads, 1, tokens, dim).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forest: Forest, scaling: float) -> Tensor:
        heads, groups, tokens, dim = q.shape
        out = q.new_zeros(tokens, heads, groups, dim).permute(1, 2, 0, 3)
        lse = q.new_zeros(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, keys, causal in _blocks(forest):
            inputs = (q[:, :, queries], *_expand(q, k[:, :, keys], v[:, :, keys]))
            piece, piece_lse = FLASH(*inputs, 0.0, causal, scale=scaling)
            if causal:
                out[:, :, queries], lse[:, :, queries] = piece, piece_lse
            else:
                _join(out[:, :, queries], lse[:, :, queries], piece, piece_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.forest, ctx.scaling = forest, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        for queries, keys, causal in _blocks(ctx.forest):
            at = (slice(None), slice(None), queries)
            inputs = (grad[at], q[at], *_expand(q, k[:, :, keys], v[:, :, keys]), out[at], lse[at])
            pieces = FLASH_BACKWARD(*inputs, 0.0, causal, scale=ctx.scaling)
            grads[0][at] += pieces[0]
            grads[1][:, :, keys] += pieces[1].sum(1, keepdim=True)
            grads[2][:, :, keys] += pieces[2].sum(1, keepdim=True)
        return (*grads, None, None)


_path_attention: Callable[..., Tensor] = _PathAttention.apply


def _join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge attention to further keys into attention to some, in place."""
    joint = torch.logaddexp(lse, more_lse)
    out.mul_((lse - joint).exp_()[..., None]).add_(more * (more_lse - joint).exp_()[..., None])
    lse.copy_(joint)


def _expand(q: Tensor, *keys: Tensor) -> Iterator[Tensor]:
    """Keys or values seen once by every query head of their group, without a copy."""
    return (t.expand(-1, q.shape[1], -1, -1) for t in keys)


def _blocks(forest: Forest) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, causal): the blocks of the score matrix, of each query first the one on its own segment."""
    for prompt, responses in forest.active_spans():
        for span in responses if forest.prefix else (prompt, *responses):
            yield forest.queries(span), slice(*span), True
        for span in merged(responses):
            yield forest.queries(span), slice(*prompt), False
