"""Losses over pairs of log-ratios to a reference model: DPO and its relatives.

Throughout, u = log(policy / reference) of a response, w the winner and l the loser of a strict pair; the formula is
that of one pair. All read ``Ranked.ref_logps``, and all take ``pairs`` ("all" strict pairs of the list, or
"best-worst") and ``reduction`` ("mean" or "sum" over those pairs); lists of two have one pair, where neither matters.
``label_smoothing`` is the share of labels taken to be flipped; ``length_penalty`` the exponent of the length.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rankalign.losses.core import (
    EXPONENT_LIMIT,
    Pairs,
    Reduction,
    check,
    check_choice,
    check_smoothing,
    chosen_pairs,
    lengths,
    log_ratios,
    logistic,
    margins,
    over_candidates,
    over_pairs,
    present,
    reference_logps,
    sides,
)
from rankalign.losses.ranked import Ranked

Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def dpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_penalty: float = 0.0,
    f_divergence_type: Divergence = "reverse_kl",
    alpha: float = 0.5,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO: logistic loss on the difference of log-ratios, with label smoothing (cDPO) and f-divergences.

    g = f'(e^u) / lengths ** length_penalty; d = beta * (g_w - g_l);
    loss = -(1 - eps) * log sigmoid(d) - eps * log sigmoid(-d).
    Rafailov et al. 2023, DPO (arXiv:2305.18290), eq. 7; Mitchell 2023, cDPO, eq. 3 (eps); Wang et al. 2023,
    f-DPO (arXiv:2309.16240), eq. 9 and table 1 (f').

    Args:
        beta: strength of the pull to the reference.
        length_penalty: exponent of the length that divides the score; 0 is the paper.
        f_divergence_type: f'(e^u) = u (reverse_kl), 1 - e^-u (forward_kl), log 2 + log sigmoid(u) (js_divergence),
            (1 - e^-(alpha u)) / alpha (alpha_divergence). Exponents are cut at 80, where fp32 ends.
        alpha: of the alpha divergence; 0 is reverse_kl, 1 is forward_kl.
    """
    score = _divergence_score(log_ratios(ranked), f_divergence_type, alpha) / lengths(ranked) ** length_penalty
    selected = chosen_pairs(ranked, pairs)
    return over_pairs(logistic(beta * margins(score, selected), label_smoothing), selected, reduction)


def sigmoid_norm(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Length-normalised DPO: DPO on log-ratios a token.

    loss = -log sigmoid(beta * (u_w / len_w - u_l / len_l)), smoothed as in DPO.
    Meng et al. 2024, SimPO (arXiv:2405.14734), appendix I; Lambert et al. 2024, Tulu 3 (arXiv:2411.15124), section 5.

    Args:
        beta: scale of the difference; Tulu 3 uses 5, as differences a token are small.
    """
    return dpo(ranked, beta=beta, label_smoothing=label_smoothing, length_penalty=1.0, pairs=pairs, reduction=reduction)


def ipo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    length_penalty: float = 1.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """IPO: squared distance of the difference of log-ratios from 1 / (2 beta).

    h = u_w / len_w ** length_penalty - u_l / len_l ** length_penalty; loss = (h - 1 / (2 beta)) ** 2.
    Azar et al. 2023, IPO (arXiv:2310.12036), eq. 17 (beta is the paper's tau).

    Args:
        beta: inverse of twice the margin aimed at.
        length_penalty: exponent of the length; 0 is the equation as printed, 1 what its authors ran, so the default.
    """
    selected = chosen_pairs(ranked, pairs)
    difference = margins(log_ratios(ranked) / lengths(ranked) ** length_penalty, selected)
    return over_pairs((difference - 1 / (2 * beta)) ** 2, selected, reduction)


def robust(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Robust DPO: unbiased estimate of the DPO loss when a known share of the labels is flipped.

    d = beta * (u_w - u_l); loss = (-(1 - eps) log sigmoid(d) + eps log sigmoid(-d)) / (1 - 2 eps).
    Chowdhury et al. 2024, Provably Robust DPO (arXiv:2403.00409), section 3.1.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: eps, the share of flipped labels, below 0.5.
    """
    check_smoothing(label_smoothing)
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(log_ratios(ranked), selected)
    unbiased = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return over_pairs(unbiased / (1 - 2 * label_smoothing), selected, reduction)


def hinge(ranked: Ranked, *, beta: float = 0.05, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """RSO hinge: hinge loss with margin 1 on the difference of log-ratios.

    loss = max(0, 1 - beta * (u_w - u_l)).
    Liu et al. 2023, RSO (arXiv:2309.06657), hinge-norm (beta is the paper's gamma).

    Args:
        beta: inverse of the margin aimed at, nats.
    """
    selected = chosen_pairs(ranked, pairs)
    return over_pairs(torch.relu(1 - beta * margins(log_ratios(ranked), selected)), selected, reduction)


def exo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """EXO: reverse KL from the policy's preference between two responses to the smoothed label.

    q = sigmoid(beta * (u_w - u_l)); loss = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps).
    Ji et al. 2024, EXO (arXiv:2402.00856), eq. 16.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: eps, above 0: the divergence from a hard label is infinite.
    """
    check_smoothing(label_smoothing)
    check(label_smoothing > 0, "loss 'exo' needs label_smoothing above 0")
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(log_ratios(ranked), selected)
    right = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(label_smoothing))
    return over_pairs(right + wrong, selected, reduction)


def sppo(ranked: Ranked, *, beta: float = 0.001, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """SPPO: squared distance of each log-ratio from its share of wins, one pair at a time.

    loss = (u_w - 1 / (2 beta)) ** 2 + (u_l + 1 / (2 beta)) ** 2.
    Wu et al. 2024, SPPO (arXiv:2405.00675), eq. 4.7 with P = 1 for the winner and 0 for the loser (beta = 1 / eta).
    Over all strict pairs the minimum is at u_i = (share of pairs that i wins - 1/2) / beta, the soft form.

    Args:
        beta: inverse of the step eta of the paper, which uses eta = 1000.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    return over_pairs((chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, selected, reduction)


def apo_zero(ranked: Ranked, *, beta: float = 0.1, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """APO-zero: raise winners and lower losers, for winners better than the model.

    loss = 1 - sigmoid(beta u_w) + sigmoid(beta u_l).
    D'Oosterlinck et al. 2024, APO (arXiv:2408.06266), eq. 7.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    return over_pairs(torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected), selected, reduction)


def apo_down(ranked: Ranked, *, beta: float = 0.1, pairs: Pairs = "all", reduction: Reduction = "mean") -> Tensor:
    """APO-down: lower winners and lower losers more, for winners worse than the model.

    loss = sigmoid(beta u_w) + 1 - sigmoid(beta (u_w - u_l)).
    D'Oosterlinck et al. 2024, APO (arXiv:2408.06266), eq. 8.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    return over_pairs(torch.sigmoid(beta * chosen) + torch.sigmoid(beta * (rejected - chosen)), selected, reduction)


def bco(
    ranked: Ranked,
    *,
    beta: float = 0.01,
    delta: float = 0.0,
    threshold: float | None = None,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """BCO: a binary classifier of winners and losers whose logit is the implicit reward minus a shift.

    loss = -log sigmoid(beta u_w - delta) - log sigmoid(-(beta u_l - delta)).
    Jung et al. 2024, BCO (arXiv:2404.04656), section 4. The paper's delta is a running mean of beta * (u_w + u_l) / 2
    over past batches, which no function of one prompt can know: pass it, or keep 0.

    Args:
        beta: strength of the pull to the reference.
        delta: reward shift.
        threshold: without it, each strict pair gives a good and a bad example, summed. With it, each candidate is one
            example, good if it scores above, so that a list of one thumbs-up or thumbs-down counts too; ``reduction``
            is then over the candidates.
        pairs: all strict pairs, or best against worst; unused with ``threshold``.
    """
    logits = beta * log_ratios(ranked) - delta
    if threshold is not None:
        examples = torch.where(ranked.scores > threshold, logsigmoid(logits), logsigmoid(-logits))
        return over_candidates(ranked, -examples, reduction)
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(logits, selected)
    return over_pairs(-logsigmoid(chosen) - logsigmoid(-rejected), selected, reduction)


def discopop(
    ranked: Ranked,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """DiscoPOP: logistic and exponential loss, mixed by the margin itself.

    d = beta * (u_w - u_l), m = sigmoid(d / tau); loss = -(1 - m) log sigmoid(d) + m exp(-d).
    Lu et al. 2024, DiscoPOP (arXiv:2406.08414), eq. 5.

    Args:
        beta: strength of the pull to the reference.
        tau: width of the transition between the two; below 1, else the exponential part is unbounded.
    """
    check(0 < tau <= 1, f"loss keyword tau={tau} must be in (0, 1]")
    selected = chosen_pairs(ranked, pairs)
    logits = beta * margins(log_ratios(ranked), selected)
    # m exp(-d) in one exponential: the product of the two is 0 x inf for a large negative margin
    exponential = torch.exp(logsigmoid(logits / tau) - logits)
    return over_pairs(-torch.sigmoid(-logits / tau) * logsigmoid(logits) + exponential, selected, reduction)


def aot(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """AOT, paired: the policy's margins dominate the reference's, quantile by quantile, over the pairs of a list.

    With a(k), b(k) the k-th smallest of logps_w - logps_l and of ref_w - ref_l over the list's pairs:
    loss = mean over k of -log sigmoid(beta * (a(k) - b(k))), smoothed as in DPO.
    Melnyk et al. 2024, AOT (arXiv:2406.05882), section 3. The paper sorts over a batch of prompts; here every prompt is
    its own batch, so that the loss stays a function of one prompt. A list with one pair gives DPO.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    policy, front = _quantiles(margins(present(ranked, ranked.logps), selected), selected)
    reference, _ = _quantiles(margins(reference_logps(ranked), selected), selected)
    return over_pairs(logistic(beta * (policy - reference), label_smoothing), front, reduction)


def aot_unpaired(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """AOT, unpaired: winners' log-ratios dominate losers', quantile by quantile, over the pairs of a list.

    With c(k), r(k) the k-th smallest of u_w and of u_l over the list's pairs (a response counts once a pair):
    loss = mean over k of -log sigmoid(beta * (c(k) - r(k))), smoothed as in DPO.
    Melnyk et al. 2024, AOT (arXiv:2406.05882), section 3; sorted within a prompt, see :func:`aot`.

    Args:
        beta: strength of the pull to the reference.
    """
    selected = chosen_pairs(ranked, pairs)
    chosen, rejected = sides(log_ratios(ranked), selected)
    (chosen, front), (rejected, _) = _quantiles(chosen, selected), _quantiles(rejected, selected)
    return over_pairs(logistic(beta * (chosen - rejected), label_smoothing), front, reduction)


def _quantiles(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(P, N, N) values of the pairs sorted to the front, 0 behind, and the mask of that front."""
    flat, real = values.flatten(1), pairs.flatten(1)
    ordered = flat.masked_fill(~real, torch.inf).sort(dim=1).values
    front = torch.arange(flat.shape[1], device=flat.device) < real.sum(1, keepdim=True)
    return torch.where(front, ordered, torch.zeros_like(flat)).view_as(values), front.view_as(pairs)


def kto(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: float = 0.0,
    threshold: float | None = None,
    pairs: Pairs = "all",
) -> Tensor:
    """KTO: prospect-theoretic value of desirable and undesirable responses against a KL baseline.

    desirable: desirable_weight * (1 - sigmoid(beta * (u - z))); undesirable: undesirable_weight *
    (1 - sigmoid(beta * (z - u))); z = max(kl, 0); loss = mean over the examples.
    Ethayarajh et al. 2024, KTO (arXiv:2402.01306), section 4, the loss and its z_0. The paper estimates z_0 from
    mismatched pairs of a batch, which no function of one prompt can know: pass it, or keep 0, which gives APO-zero,
    unpaired.

    Args:
        beta: risk aversion.
        desirable_weight: the paper's lambda_D.
        undesirable_weight: lambda_U.
        kl: estimate of KL(policy || reference), nats; no gradient flows through it.
        threshold: without it, each strict pair gives a desirable and an undesirable example. With it, each candidate
            is one example, desirable if it scores above, so that a list of one thumbs-up or thumbs-down counts too.
        pairs: all strict pairs, or best against worst; unused with ``threshold``.
    """
    ratios, baseline = log_ratios(ranked), max(kl, 0.0)
    good = desirable_weight * torch.sigmoid(beta * (baseline - ratios))
    bad = undesirable_weight * torch.sigmoid(beta * (ratios - baseline))
    if threshold is not None:
        return over_candidates(ranked, torch.where(ranked.scores > threshold, good, bad), "mean")
    selected = chosen_pairs(ranked, pairs)
    return over_pairs((good.unsqueeze(2) + bad.unsqueeze(1)) / 2, selected, "mean")


def _divergence_score(ratios: Tensor, kind: Divergence, alpha: float) -> Tensor:
    """(P, N) f'(e^ratios), which takes the log-ratio's place where another divergence ties policy to reference."""
    check_choice("f_divergence_type", kind, ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"))
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if kind == "reverse_kl" or (kind == "alpha_divergence" and alpha == 0):
        return ratios
    order = alpha if kind == "alpha_divergence" else 1.0
    return -torch.expm1((-order * ratios).clamp(max=EXPONENT_LIMIT)) / order
