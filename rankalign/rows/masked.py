"""Attention along trees by a mask, tree by tree: for what no flash kernel takes (soft-caps, dropout, other types)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from rankalign.rows.tree import Forest, Span


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(1, tokens, heads, dim) attention; arguments as of :func:`rankalign.rows.attention.tree_attention`."""
    offset = forest.offset
    placed: list[tuple[int, Tensor]] = []
    for i, tree in enumerate(forest.trees):
        rows = [(max(a - offset, 0), b - offset) for a, b in tree.pieces if b > offset]
        q, k, v = _pick(query, rows), _pick(key, tree.pieces), _pick(value, tree.pieces)
        mask = forest.mask(i, window, query.device)[-q.shape[2] :]
        if softcap or sinks is not None:
            piece = _plain(q, k, v, mask, scaling, dropout, softcap, sinks)
        elif query.is_cuda:
            # With `enable_gqa` and a mask SDPA has its math kernel alone on a GPU; over repeated keys a lean one.
            k, v = _repeated(q, k, v)
            piece = scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)
        else:
            piece = scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling, enable_gqa=True)
        parts = torch.split(piece, [b - a for a, b in rows], 2)
        placed += [(a, part) for (a, _), part in zip(rows, parts, strict=True)]
    placed.sort(key=lambda pair: pair[0])  # where prompts stand first, a tree is two pieces of the row
    return torch.cat([part for _, part in placed], 2).transpose(1, 2).contiguous()  # as layers expect it


def _pick(tensor: Tensor, spans: list[Span]) -> Tensor:
    """(1, heads, tokens of the spans, dim)."""
    parts = [tensor[:, :, a:b] for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _repeated(query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    """Keys or values once for each query head."""
    return tuple(t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in keys)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft-capped scores or with sinks, which no kernel of SDPA offers."""
    key, value = _repeated(query, key, value)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    return drop(weights[..., : key.shape[2]], dropout) @ value
