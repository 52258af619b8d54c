"""Attention along trees on the CPU's own flash kernel: one call a segment, halves joined by their log-sum-exps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankalign.rows.sinks import join_sinks, sink_slopes
from rankalign.rows.tree import Forest, merged

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def path_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """(1, tokens, heads, dim) attention of every token to its whole path.

    Args:
        query: (1, heads, tokens, dim).
        key: (1, key heads, tokens, dim), those of a prompt that is not in the row in front.
        value: like ``key``.
        forest: the trees of the row.
        scaling: factor on the scores.
        sinks: (heads,) score of each head's sink, where it has one.
    """
    q = query.view(key.shape[1], -1, *query.shape[2:])
    k, v = (t.transpose(0, 1) for t in (key, value))
    own = None if sinks is None else sinks.view(*q.shape[:2], 1)
    return _path_attention(q, k, v, own, forest, scaling).flatten(0, 1).transpose(0, 1)[None]


class _PathAttention(torch.autograd.Function):
    """Flash attention by segments: the prompt on itself, each response on itself and, all together, on the prompt.

    The two halves of a response are joined by their log-sum-exps. Backward runs the kernel's backward on each half with
    the joint output and log-sum-exp, which makes the halves' probabilities, and so the gradients, those of the whole.
    Queries are (key heads, queries per key head, tokens, dim), keys and values (key heads, 1, tokens, dim), sinks (key
    heads, queries per key head, 1).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, forest: Forest, scaling: float
    ) -> Tensor:
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
        if sinks is not None:
            lse, share = join_sinks(lse, sinks)
            out.mul_(share[..., None])
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.forest, ctx.scaling = forest, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        for queries, keys, causal in _blocks(ctx.forest):
            at = (slice(None), slice(None), queries)
            inputs = (grad[at], q[at], *_expand(q, k[:, :, keys], v[:, :, keys]), out[at], lse[at])
            pieces = FLASH_BACKWARD(*inputs, 0.0, causal, scale=ctx.scaling)
            grads[0][at] += pieces[0]
            grads[1][:, :, keys] += pieces[1].sum(1, keepdim=True)
            grads[2][:, :, keys] += pieces[2].sum(1, keepdim=True)
        of_sinks = None
        if sinks is not None:
            of_sinks = sink_slopes(grad, out, lse, sinks).sum(2, keepdim=True).to(sinks.dtype)
        return (*grads, of_sinks, None, None)


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
