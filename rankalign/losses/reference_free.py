"""Losses over pairs that need no reference model.

Throughout, p = logps / lengths ** length_penalty (0 gives sums of token log-probs, 1 their mean), w is the winner and l
the loser of a strict pair; the formula is that of one pair. ``pairs`` takes "all" strict pairs of the list or
"best-worst", ``reduction`` "mean" or "sum" over them; ``sft_reduction`` sums the best response's token NLL or takes its
mean; ``label_smoothing`` is the share of labels taken to be flipped.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankalign.losses.core import (
    EXPONENT_LIMIT,
    Pairs,
    Reduction,
    Summed,
    Terms,
    best_nll,
    check_choice,
    chosen_pairs,
    lengths,
    logistic,
    margins,
    over_pairs,
    policy_scores,
    present,
)
from rankalign.losses.ranked import Ranked


@Summed
def rrhf(
    ranked: Ranked,
    *,
    rrhf_weight: float = 1.0,
    length_penalty: float = 1.0,
    sft_reduction: Reduction = "sum",
    compat: Literal["paper", "release"] = "paper",
) -> Terms:
    """RRHF: hinge without margin over all strict pairs of length-normalised log-probs, plus NLL of the best.

    p_i = logps_i / lengths_i ** length_penalty;
    loss = rrhf_weight * sum_{r_i < r_j} max(0, p_i - p_j) - logps_best.
    Yuan et al. 2023, RRHF (arXiv:2304.05302), section 3.1, p_i, L_rank, L_ft and their sum.

    Args:
        rrhf_weight: weight of the rank term (paper 1; the released code's default is 100, its scripts pass 1).
        sft_reduction: ``sum`` over the best response's tokens (paper) or ``mean``.
        compat: ``release`` divides by the padded length, prompt + longest response of the list, in both terms, as the
            released code does; it reads ``Ranked.prompt_lengths`` and ignores ``sft_reduction``.
    """
    check_choice("compat", compat, ("paper", "release"))
    if compat == "release":
        padded = _padded_lengths(ranked)
        scores = present(ranked, ranked.logps) / padded.unsqueeze(1) ** length_penalty
        sft = best_nll(ranked, "sum") / padded
    else:
        scores, sft = policy_scores(ranked, length_penalty), best_nll(ranked, sft_reduction)
    rank = over_pairs(torch.relu(-margins(scores, ranked.pairs)), ranked.pairs, "sum")
    return {"rank_loss": (rrhf_weight, rank), "sft_loss": (1.0, sft)}


def _padded_lengths(ranked: Ranked) -> Tensor:
    """(P,) width of the padded rows in which the released RRHF code sees each list."""
    if ranked.prompt_lengths is None:
        raise ValueError("compat='release' needs Ranked.prompt_lengths")
    return ranked.prompt_lengths.to(ranked.logps.dtype) + lengths(ranked).amax(1)


@Summed
def slic_hf(
    ranked: Ranked,
    *,
    delta: float = 1.0,
    sft_weight: float = 0.5,
    length_penalty: float = 0.0,
    sft_reduction: Reduction = "sum",
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Terms:
    """SLiC-HF: hinge with a margin on log-probs, plus NLL of the best.

    loss = max(0, delta - p_w + p_l) - sft_weight * logps_best.
    Zhao et al. 2023, SLiC-HF (arXiv:2305.10425), section 2, rank calibration loss.

    Args:
        delta: margin, nats.
        sft_weight: weight of the likelihood term (the paper's lambda); its target here is the best candidate.
        sft_reduction: ``sum`` over the best response's tokens (paper) or ``mean``.
    """
    selected = chosen_pairs(ranked, pairs)
    violation = torch.relu(delta - margins(policy_scores(ranked, length_penalty), selected))
    rank = over_pairs(violation, selected, reduction)
    return {"rank_loss": (1.0, rank), "sft_loss": (sft_weight, best_nll(ranked, sft_reduction))}


@Summed
def orpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    sft_reduction: Reduction = "mean",
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Terms:
    """ORPO: logistic loss on log odds ratios of mean token probabilities, plus NLL of the best.

    s = logps / lengths, log odds(s) = s - log(1 - e^s);
    loss = -logps_best / lengths_best - beta * log sigmoid(log odds(s_w) - log odds(s_l)).
    Hong et al. 2024, ORPO (arXiv:2403.07691), eqs. 4, 6 and 7 (beta is the paper's lambda).

    Args:
        beta: weight of the odds-ratio term.
        sft_reduction: ``mean`` over the best response's tokens (paper) or ``sum``.
    """
    selected = chosen_pairs(ranked, pairs)
    log_odds = _log_odds(policy_scores(ranked, 1.0))
    rank = over_pairs(logistic(margins(log_odds, selected), 0.0), selected, reduction)
    return {"rank_loss": (beta, rank), "sft_loss": (1.0, best_nll(ranked, sft_reduction))}


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; log p is cut one rounding step below 0, where the odds would be infinite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


@Summed
def cpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    sft_weight: float = 1.0,
    label_smoothing: float = 0.0,
    length_penalty: float = 0.0,
    sft_reduction: Reduction = "mean",
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Terms:
    """CPO: DPO with a uniform reference, plus NLL of the best.

    loss = -log sigmoid(beta * (p_w - p_l)) + sft_weight * nll_best.
    Xu et al. 2024, CPO (arXiv:2401.08417), section 3, L_prefer + L_NLL.

    Args:
        beta: scale of the difference.
        sft_weight: weight of the likelihood term.
        sft_reduction: ``mean`` over the best response's tokens, as the authors' code, or ``sum``, as printed.
    """
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(policy_scores(ranked, length_penalty), selected)
    rank = over_pairs(logistic(logits, label_smoothing), selected, reduction)
    return {"rank_loss": (1.0, rank), "sft_loss": (sft_weight, best_nll(ranked, sft_reduction))}


def simpo(
    ranked: Ranked,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    length_penalty: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """SimPO: logistic loss with a margin on mean token log-probs.

    loss = -log sigmoid(beta * (p_w - p_l) - gamma).
    Meng et al. 2024, SimPO (arXiv:2405.14734), eq. 6.

    Args:
        beta: scale of the difference.
        gamma: margin; the authors' flag ``gamma_beta_ratio`` is gamma / beta (0.25 here).
    """
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(policy_scores(ranked, length_penalty), selected) - gamma
    return over_pairs(logistic(logits, label_smoothing), selected, reduction)


def alphapo(
    ranked: Ranked,
    *,
    alpha: float = 0.25,
    beta: float = 2.5,
    gamma: float = 0.1,
    label_smoothing: float = 0.0,
    length_penalty: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """AlphaPO: SimPO with a reward that is a power of the mean token probability.

    r = (1 - e^(-alpha p)) / alpha; loss = -log sigmoid(beta * (r_w - r_l) - gamma); alpha 0 is its limit, SimPO.
    Gupta et al. 2025, AlphaPO (arXiv:2501.03884), its reward function and objective.

    Args:
        alpha: shape of the reward.
        beta: scale of the difference.
        gamma: margin.
    """
    scores = policy_scores(ranked, length_penalty)
    rewards = -torch.expm1((-alpha * scores).clamp(max=EXPONENT_LIMIT)) / alpha if alpha else scores
    selected = chosen_pairs(ranked, pairs)
    return over_pairs(logistic(beta * margins(rewards, selected) - gamma, label_smoothing), selected, reduction)


def ranknet(
    ranked: Ranked,
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    length_penalty: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """RankNet: logistic loss on differences of the policy's length-normalised log-probs.

    loss = log(1 + e^(-beta * (p_w - p_l))).
    Burges et al. 2005, RankNet, eq. 3 with target probability 1 - label_smoothing.

    Args:
        beta: scale of the difference.
    """
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(policy_scores(ranked, length_penalty), selected)
    return over_pairs(logistic(logits, label_smoothing), selected, reduction)


def simper(
    ranked: Ranked, *, length_penalty: float = 1.0, pairs: Pairs = "all", reduction: Reduction = "mean"
) -> Tensor:
    """SimPER: inverse perplexity of the loser minus that of the winner; nothing to tune.

    loss = e^p_l - e^p_w.
    Xiao et al. 2025, SimPER (arXiv:2502.00883), its objective, with p the mean log-prob a token.
    """
    selected = chosen_pairs(ranked, pairs)
    return over_pairs(-margins(policy_scores(ranked, length_penalty).exp(), selected), selected, reduction)
