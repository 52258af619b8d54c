"""Losses over whole lists of log-ratios to a reference, beside those of :mod:`rankalign.losses.listwise`.

u = log(policy / reference) of a response, r its score, s = beta * u. Tied candidates are never compared.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankalign.losses.core import (
    EXPONENT_LIMIT,
    best_of_all,
    check,
    deviations,
    log_ratios,
    margins,
    masked,
    present,
    score_target,
    score_values,
    usable,
)
from rankalign.losses.listwise import ahead_of_all_below, relevance
from rankalign.losses.ranked import Ranked

_SINKHORN = 50  # as its authors ran it, without their early stop, which asks the whole batch


def infonca(ranked: Ranked, *, beta: float = 0.01, temperature: float = 0.0) -> Tensor:
    """InfoNCA, ListNet against a reference: cross-entropy from the scores' distribution to that of implicit rewards.

    q = softmax(r / temperature), or even over the best where temperature is 0; loss = -sum_i q_i log softmax(s)_i.
    Chen et al. 2024, InfoNCA (arXiv:2402.05369), L_InfoNCA for K responses; two responses at temperature 0 give DPO.
    It is LiPO's softmax cross-entropy too (arXiv:2402.01878).

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        temperature: of the scores (the paper's alpha).
    """
    log_probs = masked(beta * log_ratios(ranked), ranked.mask).log_softmax(1)
    return usable(ranked, -(score_target(ranked, temperature) * present(ranked, log_probs)).sum(1))


def softmax_dpo(ranked: Ranked, *, beta: float = 1.0) -> Tensor:
    """Softmax-DPO: the best response against all worse ones at once; DPO on lists of two.

    loss = log(1 + sum over l of e^(s_l - s_w)), w the best, l all below it; the mean over those that tie for the best.
    Chen et al. 2024, S-DPO (arXiv:2406.09215), its loss.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
    """
    top = best_of_all(ranked)
    below = ranked.pairs & top.unsqueeze(2)
    total = ahead_of_all_below(-margins(beta * log_ratios(ranked), below), below)
    return total / top.sum(1).clamp(min=1)


def swepo(ranked: Ranked, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """SWEPO: all responses above the mean score against all of them, each weighted by its distance from the mean.

    w_i = e^(alpha * |r_i - mean r|); loss = -log(sum over r_i > mean of w_i e^(s_i) / sum over all of w_i e^(s_i)).
    Gupta et al. 2024, SWEPO (arXiv:2412.04628), its weighted contrastive loss with deviations to the power 1.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        alpha: how much outliers count.
    """
    apart = deviations(ranked)
    weighted = beta * log_ratios(ranked) + alpha * apart.abs()
    above = best_of_all(ranked) | (ranked.mask & (apart > 0))  # the best is, whatever the mean was rounded to
    both = [masked(weighted, part).logsumexp(1) for part in (above, ranked.mask)]
    return usable(ranked, both[1] - both[0])


def exo_list(ranked: Ranked, *, beta: float = 0.1, temperature: float = 1.0) -> Tensor:
    """EXO over lists: reverse KL from the policy's distribution over the list to the scores'.

    p = softmax(s), q = softmax(r / temperature); loss = sum_i p_i (log p_i - log q_i).
    Ji et al. 2024, EXO (arXiv:2402.00856), the loss of K completions with rewards (temperature is the paper's beta_r).

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference (the paper's beta_pi).
        temperature: of the scores.
    """
    check(temperature > 0, f"loss keyword temperature={temperature} must be above 0")
    log_p = masked(beta * log_ratios(ranked), ranked.mask).log_softmax(1)
    log_q = masked(score_values(ranked) / temperature, ranked.mask).log_softmax(1)
    terms = present(ranked, log_p).exp() * (present(ranked, log_p) - present(ranked, log_q))
    return usable(ranked, present(ranked, terms).sum(1))


def approx_ndcg(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    tau: float = 1.0,
    gain: Literal["win_rate", "score"] = "win_rate",
) -> Tensor:
    """Approximate NDCG (PPA): one minus the NDCG of the ranking by implicit reward, its places made smooth.

    place_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / tau); G = 2^psi - 1;
    loss = 1 - (sum_i G_i / log2(1 + place_i)) / (the same of the right order).
    Zhao et al. 2024, Permutative Preference Alignment (arXiv:2410.04346), with the ApproxNDCG of Qin et al. 2010.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        tau: how sharp places are.
        gain: psi: ``win_rate`` as in ``lambdaloss``, or ``score``, above the list's worst and cut at 80.
    """
    check(tau > 0, f"loss keyword tau={tau} must be above 0")
    s = beta * log_ratios(ranked)
    others = (
        ranked.mask.unsqueeze(2) & ranked.mask.unsqueeze(1) & ~torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    )
    behind = torch.sigmoid((s.unsqueeze(1) - s.unsqueeze(2)) / tau)
    places = 1 + torch.where(others, behind, torch.zeros_like(behind)).sum(2)
    gains = _gains(ranked, gain)
    return _short_of_ideal(ranked, (gains / torch.log2(1 + places)).sum(1), gains)


def neural_ndcg(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    tau: float = 1.0,
    gain: Literal["win_rate", "score"] = "win_rate",
) -> Tensor:
    """NeuralNDCG: one minus the NDCG of gains sorted by implicit reward, where sorting is made smooth.

    Row k of the sort is softmax over j of ((N + 1 - 2k) s_j - sum_i |s_j - s_i|) / tau; columns and rows are then
    divided by their sums in turn, 50 times; G = 2^psi - 1;
    loss = 1 - (sum_k (sort G)_k / log2(1 + k)) / (the same of the right order).
    Pobrotyn & Bialobrzeski 2021, NeuralNDCG (arXiv:2102.07831), on the sort of Grover et al. 2019 (arXiv:1903.08850).

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        tau: how sharp the sort is.
        gain: psi, as in :func:`approx_ndcg`.
    """
    check(tau > 0, f"loss keyword tau={tau} must be above 0")
    s, mask = beta * log_ratios(ranked), ranked.mask
    count = mask.sum(1, keepdim=True)
    place = torch.arange(1, s.shape[1] + 1, device=s.device)
    both = mask.unsqueeze(2) & mask.unsqueeze(1)
    gaps = s.unsqueeze(2) - s.unsqueeze(1)
    spread = torch.where(both, gaps, torch.zeros_like(gaps)).abs().sum(2)
    heights = (count + 1 - 2 * place).to(s.dtype).unsqueeze(2) * s.unsqueeze(1) - spread.unsqueeze(1)
    cells = (place <= count).unsqueeze(2) & mask.unsqueeze(1)  # (P, places, candidates)
    # In logarithms: who is far behind has cells that no float holds, and a column that adds up to 1 all the same.
    log_sort = masked(heights / tau, cells).log_softmax(2)
    for axis in (1, 2) * _SINKHORN:
        log_sort = masked(log_sort, cells).log_softmax(axis)
    sort = torch.where(cells, log_sort, -torch.inf).exp()
    gains = _gains(ranked, gain)
    return _short_of_ideal(ranked, _discounted((sort * gains.unsqueeze(1)).sum(2)), gains)


def diff_ndcg(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    tau: float = 1.0,
    gain: Literal["win_rate", "score"] = "win_rate",
) -> Tensor:
    """diffNDCG (DRPO): one minus the NDCG of gains sorted by implicit reward in a network whose swaps are made smooth.

    The candidates start in the order of their scores. In N layers neighbours at odd and at even places in turn, a in
    front of b, change places by a share of p = 1/2 + arctan((s_b - s_a) / tau) / pi, with their s and their gains;
    G = 2^psi - 1; loss = 1 - (sum_k G at place k / log2(1 + k)) / (the same of the right order).
    Zhou et al. 2024, DRPO (arXiv:2410.18127), diffNDCG, on the odd-even network with Cauchy swaps of Petersen et al.
    2022 (arXiv:2203.09630). DRPO's rank policy score, which follows means over the steps of a run, is not in it.

    Args:
        ranked: the lists, with reference log-probs.
        beta: strength of the pull to the reference.
        tau: how soft swaps are (one over the steepness).
        gain: psi, as in :func:`approx_ndcg`.
    """
    check(tau > 0, f"loss keyword tau={tau} must be above 0")
    order = _by_score(ranked, log_ratios(ranked).detach())
    s = (beta * log_ratios(ranked)).gather(1, order)
    gains = sorted_gains = _gains(ranked, gain).gather(1, order)
    count = ranked.mask.sum(1, keepdim=True)
    place = torch.arange(s.shape[1], device=s.device)
    for layer in range(s.shape[1]):
        # A list passes as many layers as it has candidates, whatever the longest list beside it.
        meet = (place[:-1] % 2 == layer % 2) & (place[1:] < count) & (layer < count)
        share = 0.5 + torch.atan((s[:, 1:] - s[:, :-1]) / tau) / math.pi
        share = torch.where(meet, share, torch.zeros_like(share))
        s, sorted_gains = _swapped(s, share), _swapped(sorted_gains, share)
    return _short_of_ideal(ranked, _discounted(sorted_gains), gains)


def _by_score(ranked: Ranked, tied: Tensor) -> Tensor:
    """(P, N) indices of the candidates from the best to the worst, those of one score by (P, N) ``tied``, none last."""
    order = tied.argsort(dim=1, descending=True, stable=True)
    scores = ranked.scores.masked_fill(~ranked.mask, -torch.inf).gather(1, order)
    return order.gather(1, scores.argsort(dim=1, descending=True, stable=True))


def _swapped(values: Tensor, share: Tensor) -> Tensor:
    """(P, N) values of which (P, N - 1) a share of each and of its next neighbour have changed places."""
    flow = share * (values[:, 1:] - values[:, :-1])
    return values + pad(flow, (0, 1)) - pad(flow, (1, 0))


def _discounted(gains: Tensor) -> Tensor:
    """(P,) DCG of (P, N) gains in the order of their places: the sum of each over log2(1 + place)."""
    places = torch.arange(1, gains.shape[1] + 1, device=gains.device, dtype=gains.dtype)
    return (gains / torch.log2(1 + places)).sum(1)


def _short_of_ideal(ranked: Ranked, found: Tensor, gains: Tensor) -> Tensor:
    """(P,) one minus the NDCG: (P,) ``found`` over the DCG of (P, N) gains in their right order."""
    best = _discounted(gains.sort(dim=1, descending=True).values)
    return usable(ranked, 1 - found / torch.where(best > 0, best, 1))


def _gains(ranked: Ranked, gain: Literal["win_rate", "score"]) -> Tensor:
    """(P, N) 2^psi - 1, 0 where there is no candidate."""
    return present(ranked, torch.exp2(_above_the_worst(ranked) if gain == "score" else relevance(ranked, gain)) - 1)


def _above_the_worst(ranked: Ranked) -> Tensor:
    """(P, N) how far each score is above the lowest of its list, cut at 80."""
    values = deviations(ranked)
    lowest = torch.where(ranked.mask, values, torch.inf).amin(1, keepdim=True)
    return present(ranked, values - lowest).clamp(max=EXPONENT_LIMIT)
