"""DPO against length bias, by counting as many tokens of the longer response as the shorter one has.

Both read ``Ranked.token_logps`` and ``Ranked.ref_token_logps``. u^t is log(policy / reference) of token t, w the winner
and l the loser of a strict pair, m the length of the shorter of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankalign.losses.core import Pairs, Reduction, check, chosen_pairs, logistic, over_pairs
from rankalign.losses.ranked import Ranked

_MIX = (0x85EBCA6B, 0xC2B2AE35)  # murmur3's last step: every bit of its argument turns half of the bits of its value


def ld_dpo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """LD-DPO: DPO in which what the longer response has beyond the shorter one counts less.

    v = sum over t <= m of u^t + alpha * sum over t > m of u^t; loss = -log sigmoid(beta * (v_w - v_l)).
    Liu et al. 2024, LD-DPO (arXiv:2409.06411), its modified likelihood.

    Args:
        beta: strength of the pull to the reference.
        alpha: what tokens beyond the shorter response count, from 0 to 1, which is DPO.
    """
    check(0 <= alpha <= 1, f"loss keyword alpha={alpha} must be from 0 to 1")
    selected, own = chosen_pairs(ranked, pairs), token_log_ratios(ranked)
    values = (1 - alpha) * _first(ranked, own) + alpha * own.sum(2)[:, :, None]
    return over_pairs(logistic(beta * _apart(values, selected), label_smoothing), selected, reduction)


def sampo(
    ranked: Ranked,
    *,
    beta: float = 0.1,
    draw_seed: float = 0.0,
    label_smoothing: float = 0.0,
    pairs: Pairs = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """SamPO: DPO on as many tokens of the longer response, drawn evenly, as the shorter one has.

    v = sum of u^t over m tokens drawn without replacement; loss = -log sigmoid(beta * (v_w - v_l)).
    Lu et al. 2024, SamPO (arXiv:2406.10957), its down-sampled reward. The paper draws anew at every step; here a
    response of a prompt keeps its order of drawing, so that a resumed run and a second pass read the same tokens.

    Args:
        beta: strength of the pull to the reference.
        draw_seed: of the draws, with ``Ranked.seeds`` and the response's length.
    """
    selected, own = chosen_pairs(ranked, pairs), token_log_ratios(ranked)
    values = _first(ranked, own.gather(2, _drawn(ranked, own.shape[2], int(draw_seed))))
    return over_pairs(logistic(beta * _apart(values, selected), label_smoothing), selected, reduction)


def token_log_ratios(ranked: Ranked) -> Tensor:
    """(P, N, T) log(policy / reference) of each token, nats, 0 where a response has none.

    Raises:
        ValueError: the list carries no log-probs of tokens.
    """
    if ranked.ref_logps is None or ranked.token_logps is None or ranked.ref_token_logps is None:
        raise ValueError("this loss needs Ranked.ref_logps, Ranked.token_logps and Ranked.ref_token_logps")
    policy, reference = ranked.token_logps, ranked.ref_token_logps
    real = torch.arange(policy.shape[2], device=policy.device) < _sizes(ranked)[:, :, None]
    nothing = torch.zeros_like(policy)
    return torch.where(real, policy, nothing) - torch.where(real, reference.to(policy), nothing)


def _sizes(ranked: Ranked) -> Tensor:
    """(P, N) tokens of each response, 0 where there is no candidate."""
    return torch.where(ranked.mask, ranked.lengths, torch.zeros_like(ranked.lengths)).long()


def _first(ranked: Ranked, values: Tensor) -> Tensor:
    """(P, N, N) ``[p, i, j]``: the sum of i's first (P, N, T) values, as many as the shorter of i and j has tokens."""
    sizes = _sizes(ranked)
    shorter = torch.minimum(sizes.unsqueeze(2), sizes.unsqueeze(1))
    return pad(values.cumsum(2), (1, 0)).gather(2, shorter)


def _apart(values: Tensor, selected: Tensor) -> Tensor:
    """(P, N, N) the winner's value beside this loser minus the loser's beside this winner, 0 where there is no pair."""
    return torch.where(selected, values - values.transpose(1, 2), torch.zeros_like(values))


def _drawn(ranked: Ranked, width: int, seed: int) -> Tensor:
    """(P, N, T) the order in which the tokens of each response are drawn, all others behind them.

    A function of integers alone, and so the same on every device, in every batch, however the list is padded.
    """
    sizes = _sizes(ranked)
    at = torch.arange(width, device=sizes.device)
    own = torch.zeros_like(sizes[:, 0]) if ranked.seeds is None else ranked.seeds.to(sizes)
    keys = _mixed(_mixed(_mixed(own + seed)[:, None] + sizes)[:, :, None] + at)
    return keys.masked_fill(at >= sizes[:, :, None], 1 << 32).argsort(dim=2, stable=True)


def _mixed(numbers: Tensor) -> Tensor:
    """int64 numbers below 2^32, scattered from the given by murmur3's last step; products may wrap, low bits hold."""
    value = numbers & 0xFFFFFFFF
    value = value ^ (value >> 16)
    value = (value * _MIX[0]) & 0xFFFFFFFF
    value = value ^ (value >> 13)
    value = (value * _MIX[1]) & 0xFFFFFFFF
    return value ^ (value >> 16)
