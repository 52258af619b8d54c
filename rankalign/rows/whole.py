"""What losses read of a token's whole distribution beside its log-probability, in the tiles of the head.

Two sums over the vocabulary at every position, neither of which ever holds the logits of all positions:

* log sum_v p_v^2, by which WPO aligns its weights (arXiv:2406.11827, section 3.2); it gets no gradient.
* KL(reference || policy) = sum_v r_v (log r_v - log p_v), TDPO's (arXiv:2404.11999, its sequential KL a token), whose
  gradient by the policy's logits is p_v - r_v. The reference is known by its hidden states and its head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rankalign.rows import gemm
from rankalign.rows.head import CHUNK, Head, OwnHead, label_logps, operand_types
from rankalign.rows.own import own_logits


@dataclass(frozen=True)
class Reference:
    """A reference at every position.

    Attributes:
        head: what makes logits of its states.
        states: (positions, hidden) its last hidden states.
    """

    head: Head | OwnHead
    states: Tensor


@dataclass(frozen=True)
class Beyond:
    """What a loss reads beside log-probabilities; values then have one more dimension: the log-prob, and each of these.

    Attributes:
        squares: log sum_v p_v^2.
        reference: KL(reference || policy); None for none.
    """

    squares: bool = False
    reference: Reference | None = None

    def __bool__(self) -> bool:
        return self.columns > 1

    @property
    def columns(self) -> int:
        """Values a token, the log-prob among them."""
        return 1 + self.squares + (self.reference is not None)


NOTHING = Beyond()


def label_values(
    head: Head | OwnHead,
    hidden: Tensor,
    labels: Tensor,
    beyond: Beyond = NOTHING,
    on_grad: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """:func:`rankalign.rows.head.label_logps`, (positions,), or with something ``beyond`` (positions, 1 + others)."""
    if not beyond:
        return label_logps(head, hidden, labels, on_grad)
    columns = [label_logps(head, hidden, labels)]
    if beyond.squares:
        columns.append(log_squares(head, hidden))
    if beyond.reference is not None:
        columns.append(divergence(head, hidden, beyond.reference))
    values = torch.stack([column.to(columns[0]) for column in columns], 1)
    if on_grad is not None and values.requires_grad:
        values.register_hook(lambda grad: on_grad(grad.abs().sum(1)))  # type: ignore[no-untyped-call]
    return values


@torch.no_grad()
def log_squares(head: Head | OwnHead, hidden: Tensor) -> Tensor:
    """(positions,) log of the sum of squared probabilities, at most 0; no gradient."""
    parts = [_log_squares(head, some) for some in torch.split(hidden, CHUNK)]
    return torch.cat(parts)


def _log_squares(head: Head | OwnHead, hidden: Tensor) -> Tensor:
    if isinstance(head, OwnHead):
        return (2 * _own_log_probs(head, hidden)).logsumexp(1)
    with torch.autocast(hidden.device.type, enabled=False):
        narrow, wide = operand_types(hidden, head.weight)
        once = torch.full((len(hidden),), -torch.inf, dtype=wide, device=hidden.device)
        twice = once
        for at, tile in head.tiles(narrow):
            logits = head.logits(hidden.to(narrow), tile, at)
            once = torch.logaddexp(once, logits.logsumexp(1))
            twice = torch.logaddexp(twice, logits.mul_(2).logsumexp(1))
        return twice - 2 * once


def divergence(head: Head | OwnHead, hidden: Tensor, reference: Reference) -> Tensor:
    """(positions,) KL(reference || policy) in nats; the policy's states, weight and bias take a gradient."""
    other = reference.head
    if isinstance(head, Head) and isinstance(other, Head):
        pieces = zip(torch.split(hidden, CHUNK), torch.split(reference.states, CHUNK), strict=True)
        return torch.cat([_divergence(x, head.weight, head.bias, head, y, other) for x, y in pieces])

    def whole(some: Tensor, theirs: Tensor) -> Tensor:
        log_p, log_r = _log_probs(head, some), _log_probs(other, theirs).detach()
        return (log_r.exp() * (log_r - log_p)).sum(1)

    run = partial(checkpoint, whole, use_reentrant=False, preserve_rng_state=False)
    pieces = zip(torch.split(hidden, CHUNK), torch.split(reference.states, CHUNK), strict=True)
    return torch.cat([run(x, y) for x, y in pieces])


def _log_probs(head: Head | OwnHead, hidden: Tensor) -> Tensor:
    """(positions, vocabulary) log-probabilities, of a chunk of positions."""
    if isinstance(head, OwnHead):
        return _own_log_probs(head, hidden)
    narrow, _ = operand_types(hidden, head.weight)
    return head.logits(hidden.to(narrow), head.weight.to(narrow), slice(None)).log_softmax(1)


def _own_log_probs(head: OwnHead, hidden: Tensor) -> Tensor:
    logits = own_logits(head.model, hidden)
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale).log_softmax(-1)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, theirs: Tensor, other: Head
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            narrow, wide = operand_types(hidden, weight)
            x, y = hidden.to(narrow), theirs.to(narrow)
            lse_p = torch.full((len(x),), -torch.inf, dtype=wide, device=x.device)
            lse_r, apart = lse_p, torch.zeros_like(lse_p)
            for at, tile in head.tiles(narrow):
                z, zr = head.logits(x, tile, at), other.logits(y, other.weight[at].to(narrow), at)
                lse_p = torch.logaddexp(lse_p, z.logsumexp(1))
                last, lse_r = lse_r, torch.logaddexp(lse_r, zr.logsumexp(1))
                # sum_v r_v (zr_v - z_v) over what was seen so far, the r of that alone
                apart = apart * (last - lse_r).exp() + ((zr - lse_r[:, None]).exp() * (zr - z)).sum(1)
        ctx.save_for_backward(hidden, weight, bias, theirs, lse_p, lse_r)
        ctx.head, ctx.other = head, other
        return apart - lse_r + lse_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, theirs, lse_p, lse_r = ctx.saved_tensors
        wanted = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow, wide = operand_types(hidden, weight)
            sums = [torch.zeros(t.shape, dtype=wide, device=t.device) if needs else None for t, needs in wanted]
            x, y, head, other = hidden.to(narrow), theirs.to(narrow), ctx.head, ctx.other
            head = Head(weight, bias, head.scale, head.cap)
            for at, tile in head.tiles(narrow):
                z, zr = head.logits(x, tile, at), other.logits(y, other.weight[at].to(narrow), at)
                slope = (z - lse_p[:, None]).exp_().sub_((zr - lse_r[:, None]).exp_()).mul_(grad[:, None])
                slope = head.pull_back(slope, z)
                if sums[2] is not None:
                    sums[2][at] += slope.sum(0)
                slope = slope.to(narrow)
                if sums[0] is not None:
                    sums[0] += gemm.product(slope, tile)
                if sums[1] is not None:
                    sums[1][at] += gemm.product(slope.t(), x)
        typed = (None if s is None else s.to(t.dtype) for s, t in zip(sums, (hidden, weight, bias), strict=True))
        return *typed, None, None, None


_divergence: Callable[..., Tensor] = _Divergence.apply
