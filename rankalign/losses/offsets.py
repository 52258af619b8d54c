"""DPO with its margin moved: by scores, by lengths, by how far the winner has fallen, by the reference's own opinion.

Throughout, u = log(policy / reference) of a response, w the winner and l the loser of a strict pair, r scores; the
formula is that of one pair. ``pairs`` takes "all" strict pairs of the list or "best-worst", ``reduction`` "mean" or
"sum" over them. Losses that read gaps of scores depend on the scores' scale.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankalign.losses.core import (
    EXPONENT_LIMIT,
    Pairs,
    Reduction,
    check,
    check_choice,
    chosen_pairs,
    lengths,
    log_ratios,
    logistic,
    margins,
    over_pairs,
    policy_scores,
    score_gaps,
    sides,
)
from rankalign.losses.ranked import Ranked


def odpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    offset: Literal["log", "linear"] = "log",
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """ODPO: DPO whose implicit rewards must differ by an offset that grows with the gap in score.

    loss = -log sigmoid(beta * (u_w - u_l) - alpha * f(r_w - r_l)).
    Amini et al. 2024, ODPO (arXiv:2402.10571), section 3, f the logarithm.

    Args:
        beta: strength of the pull to the reference.
        alpha: weight of the offset.
        offset: f: ``log``, or ``linear``, the gap as it stands.
    """
    check_choice("offset", offset, ("log", "linear"))
    selected = chosen_pairs(ranked, pairs)
    gaps = score_gaps(ranked, selected)
    if offset == "log":
        gaps = gaps.clamp(min=torch.finfo(gaps.dtype).tiny).log()
    return over_pairs(logistic(beta * margins(log_ratios(ranked), selected) - alpha * gaps, 0.0), selected, reduction)


def dpop(
    ranked: Ranked,
    *,
    beta: float = 0.3,
    penalty: float = 50.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """DPOP (Smaug): DPO that pays for a winner less likely than under the reference.

    loss = -log sigmoid(beta * (u_w - u_l - penalty * max(0, -u_w))).
    Pal et al. 2024, Smaug (arXiv:2402.13228), eq. 3.

    Args:
        beta: strength of the pull to the reference.
        penalty: the paper's lambda.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    fallen = torch.relu(-chosen)
    return over_pairs(logistic(beta * (chosen - rejected - penalty * fallen), 0.0), selected, reduction)


def r_dpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """R-DPO: DPO in which length has a price, so that a longer winner needs less of a margin.

    loss = -log sigmoid(beta * (u_w - u_l) + alpha * (len_w - len_l)).
    Park et al. 2024, Disentangling Length from Quality in DPO (arXiv:2403.19159), the regularised objective.

    Args:
        beta: strength of the pull to the reference.
        alpha: price of a token.
    """
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(log_ratios(ranked), selected) + alpha * margins(lengths(ranked), selected)
    return over_pairs(logistic(logits, 0.0), selected, reduction)


def dpo_shift(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    shift: float = 0.75,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO-Shift: DPO in which the loser counts less, so that the winner's likelihood falls less.

    loss = -log sigmoid(beta * (u_w - shift * u_l)).
    Yang et al. 2025, DPO-Shift (arXiv:2502.07599), its objective with a constant f(lambda).

    Args:
        beta: strength of the pull to the reference.
        shift: the paper's f(lambda), in (0, 1]; 1 is DPO.
    """
    check(0 < shift <= 1, f"loss keyword shift={shift} must be in (0, 1]")
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    return over_pairs(logistic(beta * (chosen - shift * rejected), 0.0), selected, reduction)


def mappo(ranked: Ranked, *, beta: float = 0.1, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """MaPPO: DPO in which the loser counts by the gap in score, a prior on how much worse it is.

    loss = -log sigmoid(beta * (u_w - (r_w - r_l) * u_l)).
    Lan et al. 2025, MaPPO (arXiv:2507.21183), its loss; the paper's rewards are in [0, 1], so that a gap of 1 is DPO.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    logits = beta * (chosen - score_gaps(ranked, selected) * rejected)
    return over_pairs(logistic(logits, 0.0), selected, reduction)


def alpha_dpo(
    ranked: Ranked,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.05,
    center: float = 0.0,
    spread: float = 1.0,
    length_penalty: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """alpha-DPO: SimPO whose margin grows where the policy has already moved from the reference in the right direction.

    p = logps / lengths ** length_penalty, v = u / lengths ** length_penalty;
    loss = -log sigmoid(beta * (p_w - p_l) - stop(gamma + alpha * (beta * (v_w - v_l) - center) / spread)).
    Wu et al. 2024, alpha-DPO (arXiv:2410.10148), its loss; no gradient flows through the margin. The paper takes
    ``center`` and ``spread``, mean and standard deviation of the margin, from the batch, which no function of one
    prompt can know: pass them, or keep 0 and 1.

    Args:
        beta: scale of the difference (default SimPO's).
        gamma: margin (default SimPO's).
        alpha: weight of what the policy has moved; 0 is SimPO.
        center: mean of the margin over past batches.
        spread: its standard deviation.
        length_penalty: exponent of the length.
    """
    check(spread > 0, f"loss keyword spread={spread} must be above 0")
    selected = chosen_pairs(ranked, pairs)
    moved = beta * margins(log_ratios(ranked) / lengths(ranked) ** length_penalty, selected)
    target = (gamma + alpha * (moved - center) / spread).detach()
    logits = beta * margins(policy_scores(ranked, length_penalty), selected) - target
    return over_pairs(logistic(logits, 0.0), selected, reduction)


def chi_po(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    r_max: float | None = None,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """chi-PO: DPO whose link adds the ratio itself, which is pessimism by chi-squared divergence.

    phi(z) = z + log z, so d = beta * (e^u_w + u_w - e^u_l - u_l); loss = -log sigmoid(clip(d, -2 r_max, 2 r_max)).
    Huang et al. 2024, chi-PO (arXiv:2407.13399), algorithm 1. Exponents are cut at 80, where fp32 ends.

    Args:
        beta: strength of the pull to the reference.
        r_max: largest reward; a pair beyond 2 r_max gets no gradient. Without it nothing is clipped.
    """
    check(r_max is None or r_max > 0, f"loss keyword r_max={r_max} must be above 0")
    u = log_ratios(ranked)
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(u.clamp(max=EXPONENT_LIMIT).exp() + u, selected)
    if r_max is not None:
        logits = logits.clamp(-2 * r_max, 2 * r_max)
    return over_pairs(logistic(logits, 0.0), selected, reduction)
