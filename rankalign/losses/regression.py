"""Losses that fit implicit rewards to numbers: to the scores, their gaps, or fixed targets.

u = log(policy / reference) of a response, r its score. Those that read scores depend on their scale. Ties make no pair,
and a list of equals gives 0, here too, although a regression could pull its responses together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rankalign.losses.core import (
    Pairs,
    Reduction,
    check,
    chosen_pairs,
    deviations,
    log_ratios,
    logistic,
    margins,
    masked,
    over_candidates,
    over_pairs,
    score_gaps,
    sides,
    usable,
)
from rankalign.losses.listwise import relevance
from rankalign.losses.ranked import Ranked


def rebel(ranked: Ranked, *, eta: float = 1.0, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """REBEL: the difference of log-ratios is fitted to the gap in score.

    loss = ((u_w - u_l) / eta - (r_w - r_l))^2.
    Gao et al. 2024, REBEL (arXiv:2404.16767), algorithm 1, with the reference as the policy that sampled; with 1 / beta
    for eta it is the reward distillation of Fisch et al. 2024 (arXiv:2405.19316).

    Args:
        eta: step size.
    """
    check(eta > 0, f"loss keyword eta={eta} must be above 0")
    selected = chosen_pairs(ranked, pairs)
    residual = margins(log_ratios(ranked), selected) / eta - score_gaps(ranked, selected)
    return over_pairs(residual**2, selected, reduction)


def reward_rpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    eta: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Reward-aware RPO (Nemotron-4): the policy's preference is fitted to that of the scores, not to a hard label.

    a = sigmoid(beta * (u_w - u_l)), b = sigmoid(eta * (r_w - r_l));
    loss = b log(b / a) + (1 - b) log((1 - b) / (1 - a)).
    Adler et al. 2024, Nemotron-4 340B (arXiv:2406.11704), section 3.3.2, the backward KL as distance.

    Args:
        beta: strength of the pull to the reference.
        eta: scale of the scores.
    """
    selected = chosen_pairs(ranked, pairs)
    logits, told = beta * margins(log_ratios(ranked), selected), eta * score_gaps(ranked, selected)
    right = torch.sigmoid(told) * (logsigmoid(told) - logsigmoid(logits))
    wrong = torch.sigmoid(-told) * (logsigmoid(-told) - logsigmoid(-logits))
    return over_pairs(right + wrong, selected, reduction)


def cal_dpo(ranked: Ranked, *, beta: float = 0.001, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """Cal-DPO: DPO whose log-ratios are calibrated to fixed rewards, so that the winner's likelihood rises.

    loss = -log sigmoid(u_w - u_l) + (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2.
    Xiao et al. 2024, Cal-DPO (arXiv:2412.14516), its loss.

    Args:
        beta: inverse of twice the reward aimed at.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return over_pairs(logistic(chosen - rejected, 0.0) + calibration, selected, reduction)


def a_star_po(ranked: Ranked, *, beta1: float = 0.5, beta2: float = 1e-3, reduction: Reduction = "mean") -> Tensor:
    """A*-PO: log-ratios are fitted to the optimal advantage, its value estimated from the list's own scores.

    V = beta1 * log mean_i e^(r_i / beta1); loss = mean over i of (beta2 * u_i - (r_i - V))^2.
    Brantley et al. 2025, A*-PO (arXiv:2505.20686), algorithm 1. The paper estimates V from samples of the reference and
    fits answers of the policy; here both are the list, so its answers should be the reference's.

    Args:
        ranked: the lists, with reference log-probs.
        beta1: temperature of the value.
        beta2: strength of the pull to the reference.
        reduction: over the candidates.
    """
    check(beta1 > 0, f"loss keyword beta1={beta1} must be above 0")
    scores = deviations(ranked)  # r - V is free of a shift of the scores
    count = ranked.mask.sum(1, keepdim=True).clamp(min=1).to(scores.dtype)
    value = beta1 * (masked(scores / beta1, ranked.mask).logsumexp(1, keepdim=True) - count.log())
    residual = beta2 * log_ratios(ranked) - (scores - value)
    return usable(ranked, over_candidates(ranked, residual**2, reduction))


def point_mse(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    gain: Literal["win_rate", "score"] = "win_rate",
    reduction: Reduction = "mean",
) -> Tensor:
    """LiPO's pointwise MSE: each implicit reward is fitted to the candidate's label.

    s = beta * u; loss = mean over the candidates of (psi_i - s_i)^2.
    Liu et al. 2024, LiPO (arXiv:2402.01878), the pointwise mean squared error among its baselines.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        gain: psi, as in ``lambdaloss``.
        reduction: over the candidates.
    """
    residual = relevance(ranked, gain) - beta * log_ratios(ranked)
    return usable(ranked, over_candidates(ranked, residual**2, reduction))


def point_sigmoid(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    gain: Literal["win_rate", "score"] = "win_rate",
    reduction: Reduction = "mean",
) -> Tensor:
    """LiPO's pointwise cross-entropy: each implicit reward classifies its candidate, with the label as probability.

    s = beta * u; loss = mean over the candidates of -psi_i log sigmoid(s_i) - (1 - psi_i) log sigmoid(-s_i).
    Liu et al. 2024, LiPO (arXiv:2402.01878), the pointwise sigmoid cross-entropy among its baselines.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        gain: psi, as in ``lambdaloss``; scores should be in [0, 1].
        reduction: over the candidates.
    """
    psi, s = relevance(ranked, gain), beta * log_ratios(ranked)
    terms = -psi * logsigmoid(s) - (1 - psi) * logsigmoid(-s)
    return usable(ranked, over_candidates(ranked, terms, reduction))
