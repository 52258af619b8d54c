"""DPO whose pairs do not count alike: by confidence, by likelihood under the policy, by how noisy they may be.

Notation as in :mod:`rankalign.losses.offsets`; d = beta * (u_w - u_l). Weights get no gradient except in ``focal_dpo``.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

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
    sides,
    usable,
)
from rankalign.losses.ranked import Ranked


def focal_dpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    gamma: float = 0.05,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """FocalPO: DPO that turns from pairs it gets wrong to those it gets right.

    q = sigmoid(d); loss = -q^gamma log q.
    Liu et al. 2025, FocalPO (arXiv:2501.06645), its loss.

    Args:
        beta: strength of the pull to the reference.
        gamma: how much less wrong pairs count; 0 is DPO.
    """
    check(gamma >= 0, f"loss keyword gamma={gamma} must be at least 0")
    selected = chosen_pairs(ranked, pairs)
    log_q = logsigmoid(beta * margins(log_ratios(ranked), selected))
    return over_pairs(-(gamma * log_q).exp() * log_q, selected, reduction)


def dr_dpo(ranked: Ranked, *, beta: float = 0.1, beta_prime: float = 1.0, pairs: Pairs = "all") -> Tensor:
    """Dr. DPO: distributionally robust over pairs, of which those with large losses may be mislabelled.

    loss = -beta_prime * log mean over pairs of sigmoid(d)^(1 / beta_prime).
    Wu et al. 2024, Dr. DPO (arXiv:2407.07880), its loss. The paper's mean is over a batch; here over the pairs of a
    prompt, so that the loss stays a function of one prompt. A list with one pair gives DPO.

    Args:
        beta: strength of the pull to the reference.
        beta_prime: trust in the labels; large is DPO.
    """
    check(beta_prime > 0, f"loss keyword beta_prime={beta_prime} must be above 0")
    selected = chosen_pairs(ranked, pairs)
    log_q = logsigmoid(beta * margins(log_ratios(ranked), selected)) / beta_prime
    count = selected.sum((1, 2)).clamp(min=1).to(log_q.dtype)
    return usable(ranked, -beta_prime * (masked(log_q, selected).flatten(1).logsumexp(1) - count.log()))


def wpo(ranked: Ranked, *, beta: float = 0.1, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """WPO: DPO weighted by how likely both responses are under the policy, as if they were its own.

    loss = -stop(e^p_w e^p_l) log sigmoid(d), p the mean log-prob a token.
    Zhou et al. 2024, WPO (arXiv:2406.11827), eq. 2 without its alignment of weights, which reads the whole distribution
    at every token.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(policy_scores(ranked, 1.0).detach(), selected)
    terms = (chosen + rejected).exp() * logistic(beta * margins(log_ratios(ranked), selected), 0.0)
    return over_pairs(terms, selected, reduction)


def beta_dpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    baseline: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """beta-DPO: DPO with a beta that follows the margin, larger where pairs are already apart.

    b = beta * max(1 + alpha * (mean over pairs of d - baseline), 0.01); loss = -log sigmoid(b * (u_w - u_l)).
    Wu et al. 2024, beta-DPO (arXiv:2407.08639), its dynamic beta, which gets no gradient. The paper's mean is over a
    batch and its baseline a running mean; here the mean is over the prompt's pairs, the baseline is passed or 0. The
    floor, a hundredth of beta, keeps the preference from turning round.

    Args:
        beta: strength of the pull to the reference at the baseline.
        alpha: how much it follows.
        baseline: margin at which beta stays as it is (the paper's M_0).
    """
    selected = chosen_pairs(ranked, pairs)
    apart = margins(log_ratios(ranked), selected)
    follows = (1 + alpha * (over_pairs(beta * apart, selected, "mean") - baseline)).clamp(min=0.01).detach()
    return over_pairs(logistic(beta * follows[:, None, None] * apart, 0.0), selected, reduction)
