"""Attention sinks (gpt-oss; Xiao et al. 2023, https://arxiv.org/abs/2309.17453): every head has one more score that a
token may give its attention to, with nothing behind it.

A sink joins the log-sum-exp of a token's scores, and the output shrinks by the share that it takes. Flash kernels go
backward from the joint output and log-sum-exp, whose probabilities then are those beside the sink.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exps with the sinks among the scores, and the share of attention that is left to keys.

    Args:
        lse: log-sum-exps of the scores of keys.
        sinks: the sinks' scores, of a shape that goes with them.
    """
    joint = torch.logaddexp(lse, sinks.to(lse.dtype))
    return joint, (lse - joint).exp()


def sink_slopes(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradients of the sinks' scores, of the shape of ``lse``, to be summed over tokens.

    That of a softmax's score is its probability times what its value gives less what all give; a sink's gives nothing.

    Args:
        grad: gradient of the output, the dimension of heads last, else as ``lse``.
        out: the output.
        lse: joint log-sum-exps.
        sinks: as in :func:`join_sinks`.
    """
    given = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -(sinks.to(lse.dtype) - lse).exp() * given
