"""DPO by what a token's whole distribution says: its KL from the reference's, or how sure the policy is at all.

Notation as in :mod:`rankalign.losses.reference`. ``Ranked.ref_kls`` and ``Ranked.log_squares`` come from the head's
tiles; neither ever takes the logits of all positions.
"""

from __future__ import annotations

from torch import Tensor

from rankalign.losses.core import (
    Pairs,
    Reduction,
    check,
    chosen_pairs,
    lengths,
    log_ratios,
    logistic,
    margins,
    over_pairs,
    present,
    sides,
)
from rankalign.losses.ranked import Ranked


def tdpo1(ranked: Ranked, *, beta: float = 0.1, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """TDPO1: DPO on log-ratios to which each response's KL from the reference is added, token by token.

    K = sum over t of KL(reference || policy) at token t; loss = -log sigmoid(beta * ((u_w + K_w) - (u_l + K_l))).
    Zeng et al. 2024, TDPO (arXiv:2404.11999), its loss TDPO1.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    apart = margins(log_ratios(ranked) + reference_kls(ranked), selected)
    return over_pairs(logistic(beta * apart, 0.0), selected, reduction)


def tdpo2(
    ranked: Ranked, *, beta: float = 0.1, alpha: float = 0.5, pairs: Pairs = "all", reduction: Reduction = "mean"
) -> Tensor:
    """TDPO2: TDPO1 with a weight on the KLs, and none of the gradient of the winner's.

    K as in TDPO1; loss = -log sigmoid(beta * (u_w - u_l - alpha * (K_l - stop(K_w)))).
    Zeng et al. 2024, TDPO (arXiv:2404.11999), its loss TDPO2.

    Args:
        beta: strength of the pull to the reference.
        alpha: weight of the difference of the KLs; 0 is DPO.
    """
    check(alpha >= 0, f"loss keyword alpha={alpha} must be at least 0")
    selected, kls = chosen_pairs(ranked, pairs), reference_kls(ranked)
    winners, losers = sides(kls.detach(), selected)[0], sides(kls, selected)[1]
    apart = margins(log_ratios(ranked), selected) - alpha * (losers - winners)
    return over_pairs(logistic(beta * apart, 0.0), selected, reduction)


def wpo_aligned(ranked: Ranked, *, beta: float = 0.1, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """WPO with sampled alignment: each token's likelihood is measured by what the policy's own draws have on average.

    a = mean over t of (log p(y_t) - log sum_v p(v)^2); loss = -stop(e^a_w e^a_l) log sigmoid(beta * (u_w - u_l)).
    Zhou et al. 2024, WPO (arXiv:2406.11827), eq. 2 with its sampled alignment; answers of the policy weigh about 1.

    Args:
        beta: strength of the pull to the reference.
    """
    if ranked.log_squares is None:
        raise ValueError("this loss needs Ranked.log_squares")
    selected = chosen_pairs(ranked, pairs)
    aligned = (present(ranked, ranked.logps) - present(ranked, ranked.log_squares)) / lengths(ranked)
    chosen, rejected = sides(aligned.detach(), selected)
    terms = (chosen + rejected).exp() * logistic(beta * margins(log_ratios(ranked), selected), 0.0)
    return over_pairs(terms, selected, reduction)


def reference_kls(ranked: Ranked) -> Tensor:
    """(P, N) KL(reference || policy) summed over the tokens of each response, 0 where there is no candidate.

    Raises:
        ValueError: the list carries none.
    """
    if ranked.ref_kls is None:
        raise ValueError("this loss needs Ranked.ref_kls")
    return present(ranked, ranked.ref_kls)
