"""Losses over whole lists, and likelihood of the best alone.

Ties: candidates with equal scores are never compared. Listwise likelihoods place each candidate ahead of those strictly
below it, so tied candidates meet the same rivals and not one another; without ties this is the usual product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rankalign.losses.core import (
    EXPONENT_LIMIT,
    Reduction,
    Summed,
    Terms,
    best_nll,
    check_choice,
    log_ratios,
    margins,
    masked,
    nll,
    over_pairs,
    policy_scores,
    present,
    score_target,
    score_values,
    usable,
)
from rankalign.losses.ranked import Ranked


def sft(ranked: Ranked, *, sft_reduction: Reduction = "mean") -> Tensor:
    """SFT: negative log-likelihood of the best response, the first of equals.

    loss = -logps_best (``sum`` over its tokens) or -logps_best / lengths_best (``mean``).
    """
    return best_nll(ranked, sft_reduction)


def raft(ranked: Ranked, *, sft_reduction: Reduction = "mean") -> Tensor:
    """RAFT, best-of-n: negative log-likelihood of the best responses, shared evenly among equals.

    loss = mean over i with r_i = max r of -logps_i (``sum`` over tokens) or -logps_i / lengths_i (``mean``).
    Dong et al. 2023, RAFT (arXiv:2304.06767), algorithm 1 with one best response kept a prompt.
    """
    return (score_target(ranked, 0.0) * nll(ranked, sft_reduction)).sum(1)


def nca(ranked: Ranked, *, beta: float = 0.01, temperature: float = 0.0) -> Tensor:
    """NCA: raise each response by its share of the reward, lower all of them evenly.

    q = softmax(scores / temperature), or even over the best where temperature is 0; u = log(policy / reference);
    loss = -sum_i (q_i log sigmoid(beta u_i) + log sigmoid(-beta u_i) / N).
    Chen et al. 2024, NCA (arXiv:2402.05369), L_NCA for K responses; two responses at temperature 0 give its pair form.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        temperature: of the scores (the paper's alpha).
    """
    rewards = beta * log_ratios(ranked)
    even = present(ranked, ranked.mask) / ranked.mask.sum(1, keepdim=True).clamp(min=1)
    terms = score_target(ranked, temperature) * logsigmoid(rewards) + even * logsigmoid(-rewards)
    return usable(ranked, -terms.sum(1))


def listnet(ranked: Ranked, *, beta: float = 1.0, temperature: float = 1.0, length_penalty: float = 1.0) -> Tensor:
    """ListNet: cross-entropy from the scores' top-one distribution to the policy's.

    p = logps / lengths ** length_penalty; loss = -sum_i softmax(scores / temperature)_i log softmax(beta p)_i.
    Cao et al. 2007, ListNet, top-one probabilities. Tied candidates share their target; a list of equals gives 0.

    Args:
        ranked: the lists.
        beta: inverse temperature of the policy.
        temperature: of the scores; 0 puts the target evenly on the best.
        length_penalty: exponent of the length.
    """
    scores = beta * policy_scores(ranked, length_penalty)
    log_probs = masked(scores, ranked.mask).log_softmax(1)
    return usable(ranked, -(score_target(ranked, temperature) * present(ranked, log_probs)).sum(1))


def listmle(ranked: Ranked, *, beta: float = 1.0, length_penalty: float = 1.0) -> Tensor:
    """ListMLE: Plackett-Luce likelihood of the ranking under the policy's length-normalised log-probs.

    s = beta * logps / lengths ** length_penalty; loss = sum_k log(1 + sum_{j: r_j < r_k} e^(s_j - s_k)).
    Xia et al. 2008, ListMLE.

    Args:
        ranked: the lists.
        beta: inverse temperature.
        length_penalty: exponent of the length.
    """
    return _plackett_luce(beta * policy_scores(ranked, length_penalty), ranked)


def plackett_luce(ranked: Ranked, *, beta: float = 0.1) -> Tensor:
    """Plackett-Luce DPO: likelihood of the ranking under implicit rewards; DPO on lists of two.

    s = beta * log(policy / reference); loss = sum_k log(1 + sum_{j: r_j < r_k} e^(s_j - s_k)).
    Rafailov et al. 2023, DPO (arXiv:2305.18290), appendix A.3.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
    """
    return _plackett_luce(beta * log_ratios(ranked), ranked)


@Summed
def pro(
    ranked: Ranked, *, sft_weight: float = 0.05, length_penalty: float = 1.0, sft_reduction: Reduction = "sum"
) -> Terms:
    """PRO: each response against all below it, tempered by the gaps in score, plus NLL of the best.

    p = logps / lengths ** length_penalty, t_kj = r_k - r_j over j with r_j < r_k, T_k = max_j t_kj;
    loss = sum_k log(1 + sum_j e^(p_j t_kj - p_k T_k)) + sft_weight * (N - 1)^2 * nll_best.
    Song et al. 2023, PRO (arXiv:2306.17492), L_PRO with its dynamic temperatures, plus L_SFT.

    Args:
        ranked: the lists; score gaps are temperatures, so their scale matters.
        sft_weight: weight of the likelihood term before (N - 1)^2.
        length_penalty: exponent of the length.
        sft_reduction: over the best response's tokens.
    """
    p, r = policy_scores(ranked, length_penalty), score_values(ranked)
    gaps = torch.where(ranked.pairs, r.unsqueeze(2) - r.unsqueeze(1), torch.zeros_like(p).unsqueeze(1))
    exponents = p.unsqueeze(1) * gaps - (p * gaps.amax(2)).unsqueeze(2)
    sft_weights = sft_weight * (present(ranked, ranked.mask).sum(1) - 1).clamp(min=0) ** 2
    return {
        "rank_loss": (1.0, ahead_of_all_below(exponents, ranked.pairs)),
        "sft_loss": (sft_weights, best_nll(ranked, sft_reduction)),
    }


def lambdaloss(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    gain: Literal["win_rate", "score"] = "win_rate",
    gain_function: Literal["exponential", "linear"] = "exponential",
    discount: Literal["log2", "reciprocal", "none"] = "log2",
) -> Tensor:
    """LambdaLoss (LiPO-lambda): logistic loss over pairs, each weighted by the DCG its swap would change.

    s = beta * log(policy / reference); tau_i = rank of i by s; G = 2^psi - 1; D = log2(1 + tau);
    loss = sum over strict pairs of |G_w - G_l| |1 / D_w - 1 / D_l| log(1 + e^(s_l - s_w)); the weights get no gradient.
    Liu et al. 2024, LiPO (arXiv:2402.01878), the LiPO-lambda loss. Equal s are ranked by score, so that the start of a
    run, where policy and reference agree, has the weights of the ideal ranking; equals in both share their ranks' mean.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        gain: psi: ``win_rate``, the share of the other candidates that a candidate beats (ties half), or ``score``, as
            it stands, for scores already in about [0, 1]; cut at 80, where fp32 ends.
        gain_function: G: ``exponential``, 2^psi - 1, or ``linear``, psi.
        discount: D: ``log2``, log2(1 + tau); ``reciprocal``, tau; ``none``, which leaves the gains alone.
    """
    check_choice("gain_function", gain_function, ("exponential", "linear"))
    check_choice("discount", discount, ("log2", "reciprocal", "none"))
    s = beta * log_ratios(ranked)
    psi = relevance(ranked, gain)
    weights = _gap(torch.exp2(psi) - 1 if gain_function == "exponential" else psi)
    if discount != "none":
        tau = _places(s, ranked)
        weights = weights * _gap(1 / (torch.log2(1 + tau) if discount == "log2" else tau))
    return over_pairs(weights * softplus(-margins(s, ranked.pairs)), ranked.pairs, "sum")


def _places(s: Tensor, ranked: Ranked) -> Tensor:
    """(P, N) place of each in the ranking by ``s``, equals ranked by score."""
    beaten, lower = ranked.pairs.transpose(1, 2), s.unsqueeze(2) < s.unsqueeze(1)
    return _place(lower | (beaten & ~lower.transpose(1, 2)), ranked)


def relevance(ranked: Ranked, gain: str) -> Tensor:
    """(P, N) psi of LiPO: the share of the others that a candidate beats, ties half, or its score, cut at 80."""
    check_choice("gain", gain, ("win_rate", "score"))
    if gain == "score":
        return score_values(ranked).clamp(max=EXPONENT_LIMIT)
    # the first place beats all N - 1 others, the last none
    count = present(ranked, ranked.mask).sum(1, keepdim=True)
    return (count - _place(ranked.pairs.transpose(1, 2), ranked)) / (count - 1).clamp(min=1)


def _place(behind: Tensor, ranked: Ranked) -> Tensor:
    """(P, N) place in the list, 1 first, given where i is behind j; equals share the mean of their places."""
    both = ranked.mask.unsqueeze(2) & ranked.mask.unsqueeze(1)
    level = both & ~behind & ~behind.transpose(1, 2)  # everyone is level with itself
    return 0.5 + (behind & both).to(ranked.logps.dtype).sum(2) + 0.5 * level.to(ranked.logps.dtype).sum(2)


def _gap(values: Tensor) -> Tensor:
    """(P, N, N) absolute differences."""
    return (values.unsqueeze(2) - values.unsqueeze(1)).abs()


def _plackett_luce(s: Tensor, ranked: Ranked) -> Tensor:
    """(P,) negative log-likelihood that every candidate is drawn before those strictly below it."""
    return ahead_of_all_below(-margins(s, ranked.pairs), ranked.pairs)


def ahead_of_all_below(exponents: Tensor, below: Tensor) -> Tensor:
    """(P,) sum over k of log(1 + sum over j below k of e^exponents[k, j]); exactly 0 where nothing is below."""
    rivals = torch.where(below, exponents, torch.full_like(exponents, -torch.inf))
    return torch.cat([torch.zeros_like(rivals[:, :, :1]), rivals], dim=2).logsumexp(2).sum(1)
