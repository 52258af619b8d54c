"""``aten::_flash_attention_forward`` and ``_backward`` with ragged sequences, for the pretended device.

Written from their schemas and from the checks of torch's flash_api.cpp, those that the kernel forgets included.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
any_type = False  # tests in float64 lift what the kernels are compiled for


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    def need(ok: bool, text: str) -> None:
        if not ok:
            raise RuntimeError(text)

    need(any_type or q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    need(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    need(cu_q.dtype == cu_k.dtype == torch.int32, "cu_seqlens must have dtype int32")
    need(cu_q.is_contiguous() and cu_k.is_contiguous(), "cu_seqlens must be contiguous")
    need(all(t.stride(-1) == 1 for t in (q, k, v)), "Input tensor must have contiguous last dimension")
    need(len(cu_q) == len(cu_k) > 1, "batch size must be positive")
    need(q.shape[2] % 8 == 0 and q.shape[2] <= 256, "head_size must be a multiple of 8, at most 256")
    need(q.shape[1] % k.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    need(cu_q[-1] == len(q) and cu_k[-1] == len(k), "tokens outside of all sequences: never written")
    need(max(lengths_q) <= max_q and max(lengths_k) <= max_k, "a sequence is longer than it is said to be")
    need(max_q > 1 or len(q) == len(cu_q) - 1, "at max_q 1 queries are regrouped: each sequence needs one")
    need(min(lengths_k) > 0, "a sequence without keys has no log-sum-exp")


def _parts(q, k, v, cu_q, cu_k, causal, scale, left, right):
    """Of each sequence: where it is, its scores (heads, queries, keys) with what is not seen at -inf, keys, values."""
    left, right = (-1 if left is None else left), (-1 if right is None else right)
    right = 0 if causal else right
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if a == b:
            yield slice(a, b), slice(c, d), None, None, None, None
            continue
        x = q[a:b].transpose(0, 1).to(wide)
        y, z = (t[c:d].repeat_interleave(groups, 1).transpose(0, 1).to(wide) for t in (k, v))
        ahead = torch.arange(d - c)[None] - torch.arange(b - a)[:, None] - ((d - c) - (b - a))  # aligned at the ends
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if right >= 0:
            seen &= ahead <= right
        if left >= 0:
            seen &= ahead >= -left
        yield slice(a, b), slice(c, d), (x @ y.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf), x, y, z


def forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None, window_size_left=None,
    window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """On the host's memory."""
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    assert not any((dropout_p, alibi_slopes is not None, block_table is not None, seqused_k is not None))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], len(q)), torch.nan, dtype=wide)
    for at, _, scores, _, _, z in _parts(q, k, v, cu_q, cu_k, is_causal, scale, window_size_left, window_size_right):
        if scores is not None:
            lse[:, at] = scores.logsumexp(-1)
            out[at] = ((scores - lse[:, at, None]).exp() @ z).transpose(0, 1).to(q.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), out.new_empty(0)


def backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    """On the host's memory."""
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    if grad.dtype != q.dtype or out.dtype != q.dtype:
        raise RuntimeError("query, out and dout must have the same dtype")
    if not lse.is_contiguous() or lse.shape != (q.shape[1], len(q)):
        raise RuntimeError("the kernel would read other numbers than these log-sum-exps")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, k, v))
    for at, to, scores, x, y, z in _parts(q, k, v, cu_q, cu_k, is_causal, scale, window_size_left, window_size_right):
        if scores is None:
            dk[to], dv[to] = 0, 0
            continue
        p, g, o = (scores - lse[:, at, None]).exp(), *(t[at].transpose(0, 1).to(wide) for t in (grad, out))
        ds = p * (g @ z.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
        dq[at] = (ds @ y).transpose(0, 1).to(q.dtype)
        for grads, own in ((dk, ds.transpose(1, 2) @ x), (dv, p.transpose(1, 2) @ g)):
            grads[to] = own.view(-1, groups, *own.shape[1:]).sum(1).transpose(0, 1).to(q.dtype)
    return dq, dk, dv


def rms_norm(x, shape, weight, eps):
    """On the host's memory, as the one kernel that CUDA has for it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.dtype != x.dtype or list(shape) != [x.shape[-1]]:
        raise RuntimeError("torch takes other ways for other types and shapes")
    rstd = (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.to(wide) * rstd * weight.to(wide)).to(x.dtype), rstd


def rms_norm_backward(grad, x, shape, rstd, weight, mask):
    """On the host's memory."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, normed = grad.to(wide), x.to(wide) * rstd
    slope = g * weight.to(wide)
    dx = rstd * (slope - normed * (slope * normed).mean(-1, keepdim=True))
    dw = (g * normed).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype) if mask[1] else None


IMPLEMENTATIONS = {
    "_fused_rms_norm": rms_norm,
    "_fused_rms_norm_backward": rms_norm_backward,
    "_flash_attention_forward": forward,
    "_flash_attention_backward": backward,
}
