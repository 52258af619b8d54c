"""gamma-PO: target margins that pairs share out among themselves, more to those that are apart already."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankalign.losses.core import (
    Pairs,
    Reduction,
    check,
    chosen_pairs,
    log_ratios,
    logistic,
    margins,
    masked,
    over_pairs,
    policy_scores,
)
from rankalign.losses.ranked import Ranked

_DIGITS = 37.0  # e^-37 is the rounding of a double
_MOST = 20.0  # of the ratio that the number of steps grows with; the paper's settings have 0.4 to 0.6


def gamma_simpo(
    ranked: Ranked,
    *,
    beta: float = 10.0,
    gamma: float = 4.0,
    tau: float = 10.0,
    label_smoothing: float = 0.0,
    length_penalty: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """gamma-SimPO: SimPO whose target margin is larger for pairs that are apart and smaller for near-ties.

    d = beta * (p_w - p_l); x minimises mean of -log sigmoid(d - gamma x) + tau x log x over pairs, at mean 1;
    loss = -log sigmoid(d - gamma x).
    Sun et al. 2025, gamma-PO (arXiv:2506.03690), its margins, which get no gradient. The paper solves for them over a
    queue of past batches; here over the pairs of a prompt, so that a list with one pair gives SimPO.

    Args:
        ranked: the lists.
        beta: scale of the difference.
        gamma: the mean target margin, SimPO's.
        tau: how strongly margins are held equal; large is SimPO.
        length_penalty: exponent of the length; the paper has 1.
    """
    selected = chosen_pairs(ranked, pairs)
    apart = beta * margins(policy_scores(ranked, length_penalty), selected)
    targets = gamma * _shares(apart, selected, gamma, tau)
    return over_pairs(logistic(apart - targets, label_smoothing), selected, reduction)


def gamma_dpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """gamma-DPO: DPO whose target margin is above 0 for pairs that are apart and below 0 for near-ties.

    d = beta * (u_w - u_l), x as in :func:`gamma_simpo`; loss = -log sigmoid(d - gamma (x - 1)).
    Sun et al. 2025, gamma-PO (arXiv:2506.03690), over the pairs of a prompt. A list with one pair gives DPO.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        gamma: how far margins may go from DPO's.
        tau: how strongly they are held there.
    """
    selected = chosen_pairs(ranked, pairs)
    apart = beta * margins(log_ratios(ranked), selected)
    targets = gamma * (_shares(apart, selected, gamma, tau) - 1)
    return over_pairs(logistic(apart - targets, label_smoothing), selected, reduction)


@torch.no_grad()
def _shares(apart: Tensor, selected: Tensor, gamma: float, tau: float) -> Tensor:
    """(P, N, N) the x of each pair, of mean 1 over the pairs of a list, and 1 elsewhere.

    Mirror descent on a strictly convex problem, from x = 1: x stays below e^(gamma / tau), by which the step is chosen.
    """
    check(gamma >= 0, f"loss keyword gamma={gamma} must be at least 0")
    check(tau > 0, f"loss keyword tau={tau} must be above 0")
    # Of what a step may bend, the part that is not tau's: each step leaves ratio / (1 + ratio) of the error or less.
    ratio = gamma**2 * math.exp(min(gamma / tau, 99)) / (4 * tau)
    check(ratio <= _MOST, f"loss keyword gamma={gamma} is too large for tau={tau}: margins would go to few pairs")
    step = 1 / (tau * (1 + ratio))
    log_count = selected.sum((1, 2), keepdim=True).clamp(min=1).to(apart.dtype).log()
    log_x = torch.zeros_like(apart)
    for _ in range(math.ceil(_DIGITS * (1 + ratio))):
        log_x = (1 - step * tau) * log_x - step * gamma * torch.sigmoid(gamma * log_x.exp() - apart)
        log_mean = masked(log_x, selected).logsumexp((1, 2), keepdim=True) - log_count
        log_x = torch.where(selected, log_x - log_mean, torch.zeros_like(log_x))
    return log_x.exp()
