"""The language-model head for a GPU: few wide products, and nothing that waits for the device.

The mathematics of :mod:`rankalign.rows.head`. What differs is what a GPU wants: a tile is as wide as ``BUDGET`` allows
for all positions at once; labels are found by comparison and gather, not by ``nonzero``, whose size the host would
have to wait for, which is also why positions without a gradient are computed like the others; under autocast operands
have autocast's type, with sums in float32 (``mm(..., out_dtype=float32)``, cuBLAS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankalign.rows import gemm

if TYPE_CHECKING:
    from rankalign.rows.head import Head

BUDGET = 512 << 20  # bytes of a block of logits: large enough for full speed, small beside a model's activations
POSITIONS = 8192  # most positions of a block; with BUDGET a tile is then 16k entries wide


def label_logps(head: Head, hidden: Tensor, labels: Tensor, on_grad: Callable[[Tensor], None] | None = None) -> Tensor:
    """As :func:`rankalign.rows.head.label_logps`."""
    return _label_logps(hidden, head.weight, head.bias, labels, head, _half(head, hidden), on_grad)


def _half(head: Head, hidden: Tensor) -> torch.dtype | None:
    """The 16-bit type of the operands: autocast's, or that of weights and states; None for wider ones."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    # States are wider than weights where somebody measures what rounding does, and wants none of it here.
    return head.weight.dtype if head.weight.element_size() == hidden.element_size() == 2 else None


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        half: Any,
        on_grad: Any,
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        narrow = half or wide
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = zip(torch.split(hidden, POSITIONS), torch.split(labels, POSITIONS), strict=True)
            parts = [_forward(head, x.to(narrow), y, wide) for x, y in blocks]
        own, lse = (torch.cat(some) for some in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.head, ctx.types, ctx.on_grad = head, (narrow, wide), on_grad
        return own - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        if ctx.on_grad is not None:
            ctx.on_grad(grad)
        narrow, wide = ctx.types
        wanted = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        sums = [torch.zeros(t.shape, dtype=wide, device=t.device) if needs else None for t, needs in wanted]
        head = type(ctx.head)(weight, bias, ctx.head.scale, ctx.head.cap)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), POSITIONS):
                part = slice(start, start + POSITIONS)
                block = (hidden[part].to(narrow), labels[part], lse[part, None], grad[part, None].to(wide))
                _backward(head, *block, (None if sums[0] is None else sums[0][part], *sums[1:]))
        typed = (None if s is None else s.to(t.dtype) for s, t in zip(sums, (hidden, weight, bias), strict=True))
        return *typed, None, None, None, None


_label_logps: Callable[..., Tensor] = _LabelLogps.apply


def _tiles(head: Head, positions: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary with their weights; widths are multiples of 256, which tensor cores divide evenly."""
    width = max(BUDGET // (4 * max(positions, 1)) // 256 * 256, 256)
    for start in range(0, len(head.weight), width):
        at = slice(start, min(start + width, len(head.weight)))
        yield at, head.weight[at].to(dtype)


def _forward(head: Head, x: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(positions,) logit of the label, and log-sum-exp over the vocabulary."""
    own = torch.zeros(labels.shape, dtype=wide, device=x.device)
    lse = torch.full(labels.shape, -torch.inf, dtype=wide, device=x.device)
    for at, tile in _tiles(head, len(labels), x.dtype):
        logits = head.logits(x, tile, at)
        inside, column = _columns(labels, at)
        own = torch.where(inside, logits.gather(1, column), own[:, None])[:, 0]
        lse = torch.logaddexp(lse, logits.logsumexp(1))
    return own, lse


def _backward(
    head: Head, x: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, sums: tuple[Tensor | None, ...]
) -> None:
    """Add a block's gradients to the sums of hidden states, weight and bias."""
    to_hidden, to_weight, to_bias = sums
    for at, tile in _tiles(head, len(labels), x.dtype):
        logits = head.logits(x, tile, at)
        slope = (logits - lse).exp_().mul_(-grad)
        inside, column = _columns(labels, at)
        slope.scatter_add_(1, column, torch.where(inside, grad, torch.zeros_like(grad)))
        slope = head.pull_back(slope, logits)
        if to_bias is not None:
            to_bias[at] += slope.sum(0)
        slope = slope.to(x.dtype)
        if to_hidden is not None:
            to_hidden += gemm.product(slope, tile)
        if to_weight is not None:
            to_weight[at] += gemm.product(slope.t(), x)


def _columns(labels: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """(positions, 1) each: whether the label lies in the tile, and its column there, any column if it does not."""
    column = labels[:, None] - at.start
    return (column >= 0) & (column < at.stop - at.start), column.clamp(0, at.stop - at.start - 1)
