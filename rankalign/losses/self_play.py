"""Losses of rounds in which a policy's own answers meet those of another: the reference's, or a mixture of the two.

u = log(policy / reference) of a response. ``Ranked.own`` says which answers the policy wrote. A list without a pair
gives 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankalign.losses.core import (
    Pairs,
    Reduction,
    Summed,
    Terms,
    check,
    check_choice,
    log_ratios,
    present,
    score_gaps,
    usable,
)
from rankalign.losses.ranked import Ranked
from rankalign.losses.reference import dpo


@Summed
def xpo(
    ranked: Ranked, *, beta: float = 0.1, alpha: float = 1e-5, pairs: Pairs = "all", reduction: Reduction = "mean"
) -> Terms:
    """XPO: online DPO that explores, by making the reference's own answers less likely.

    loss = DPO over the pairs + alpha * mean over the answers that the policy did not write of logps_i.
    Xie et al. 2024, XPO (arXiv:2405.21046), algorithm 1; each list holds answers of the policy and of the reference.

    Args:
        ranked: the lists, with reference log-probs and who wrote what.
        beta: strength of the pull to the reference.
        alpha: weight of exploration; 0 is online DPO.
    """
    check(alpha >= 0, f"loss keyword alpha={alpha} must be at least 0")
    others = ranked.mask & ~written(ranked)
    explored = torch.where(others, present(ranked, ranked.logps), 0).sum(1) / others.sum(1).clamp(min=1)
    return {
        "rank_loss": (1.0, dpo(ranked, beta=beta, pairs=pairs, reduction=reduction)),
        "explore_loss": (alpha, usable(ranked, explored)),
    }


@Summed
def nash_md(
    ranked: Ranked, *, beta: float = 0.1, preference: Literal["win", "bradley_terry"] = "win", eta: float = 1.0
) -> Terms:
    """Nash-MD: a policy gradient whose reward is the chance to be preferred to an answer of the mixture policy.

    P_i = mean over the others' answers j of P(i beats j), for the policy's own i;
    loss = -mean over own i of stop(P_i - 1/2 - beta * u_i) * logps_i.
    Munos et al. 2023, Nash Learning from Human Feedback (arXiv:2312.00886), Nash-MD-PG (beta is the paper's tau). The
    others are drawn from the geometric mixture of policy and reference. Its two terms are logged apart.

    Args:
        ranked: the lists, with reference log-probs and who wrote what.
        beta: price of a nat.
        preference: P(i beats j): ``win`` is 1, and 1/2 for equal scores; ``bradley_terry`` is
            sigmoid(eta * (r_i - r_j)).
        eta: scale of the scores.
    """
    check_choice("preference", preference, ("win", "bradley_terry"))
    own = ranked.mask & written(ranked)
    meets = own.unsqueeze(2) & (ranked.mask & ~own).unsqueeze(1)
    gaps = score_gaps(ranked, meets)
    wins = torch.sigmoid(eta * gaps) if preference == "bradley_terry" else (1 + gaps.sign()) / 2
    met = own & meets.any(2)
    share = torch.where(meets, wins, torch.zeros_like(wins)).sum(2) / meets.sum(2).clamp(min=1)
    logps, drift = present(ranked, ranked.logps), log_ratios(ranked).detach()

    def over_own(values: Tensor) -> Tensor:
        return usable(ranked, torch.where(met, values, torch.zeros_like(values)).sum(1) / met.sum(1).clamp(min=1))

    return {
        "rank_loss": (1.0, over_own(-(share - 0.5) * logps)),
        "kl_loss": (beta, over_own(drift * logps)),
    }


def written(ranked: Ranked) -> Tensor:
    """(P, N) bool: which answers the policy wrote itself.

    Raises:
        ValueError: the list does not say.
    """
    if ranked.own is None:
        raise ValueError("this loss needs Ranked.own")
    return ranked.own
