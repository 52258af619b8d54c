"""Losses of reward models: pure functions over ``Ranked`` whose ``logps`` are rewards, one value a prompt.

They differ from the losses over log-probabilities in that lengths play no part and that rewards are free up to a
constant, which centring pins down.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rankalign.losses.core import Loss, check, margins, over_pairs, present, score_values, sides
from rankalign.losses.listwise import listmle
from rankalign.losses.ranked import Ranked


def bradley_terry(ranked: Ranked, *, margin: float = 0.0, center_rewards_coefficient: float = 0.0) -> Tensor:
    """Bradley-Terry: every better response wins against every worse one, mean over the strict pairs of the list.

    loss = mean of -log sigmoid(r_w - r_l - margin * (s_w - s_l)) + center_rewards_coefficient * (r_w + r_l)^2.
    Ouyang et al. 2022, InstructGPT (arXiv:2203.02155), eq. 1; the margin is that of Touvron et al. 2023, Llama 2
    (arXiv:2307.09288), eq. 2; centring is that of Eisenstein et al. 2023 (arXiv:2312.09244), as TRL has it.

    Args:
        ranked: the lists; ``logps`` are rewards r, ``scores`` s.
        margin: by how much rewards should differ for each unit of score.
        center_rewards_coefficient: weight of the pull of rewards to mean 0.
    """
    logits = margins(present(ranked, ranked.logps), ranked.pairs) - margin * _score_gaps(ranked)
    return over_pairs(-logsigmoid(logits), ranked.pairs, "mean") + center_rewards_coefficient * _off_centre(ranked)


def plackett_luce(ranked: Ranked, *, center_rewards_coefficient: float = 0.0) -> Tensor:
    """Plackett-Luce: likelihood of the whole ranking; Bradley-Terry on lists of two.

    loss = sum_k log(1 + sum_{j: s_j < s_k} e^(r_j - r_k)) + center_rewards_coefficient * mean of (r_w + r_l)^2.
    Plackett 1975, Luce 1959. Ties are not compared, see :mod:`rankalign.losses.listwise`.

    Args:
        ranked: the lists; ``logps`` are rewards r, ``scores`` s.
        center_rewards_coefficient: weight of the pull of rewards to mean 0.
    """
    rank = listmle(replace(ranked, lengths=torch.ones_like(ranked.lengths)))
    return rank + center_rewards_coefficient * _off_centre(ranked)


def per_token(
    ranked: Ranked,
    traces: Tensor,
    first: Tensor,
    stop: Tensor,
    *,
    margin: float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Bradley-Terry at every token from the first that differs to the longer response's end, mean over them.

    loss of a pair = mean over first <= t < stop of -log sigmoid(v_w,t - v_l,t - margin * (s_w - s_l)); mean over the
    strict pairs; centring as in :func:`bradley_terry`, on the rewards at the ends. It is the loss of the summarisation
    example of trlX, by a log-sigmoid that cannot overflow.

    Args:
        ranked: the lists; ``logps`` are the rewards at the ends, ``scores`` s.
        traces: (P, N, T) value v at each token of each response.
        first: (P, N, N) first token in which two responses differ.
        stop: (P, N, N) tokens of the longer of the two. A pair with ``first >= stop`` is of equals and gives 0.
        margin: as in :func:`bradley_terry`.
        center_rewards_coefficient: as in :func:`bradley_terry`.
    """
    place = torch.arange(traces.shape[2], device=traces.device)
    within = ranked.pairs[..., None] & (place >= first[..., None]) & (place < stop[..., None])
    gaps = traces.unsqueeze(2) - traces.unsqueeze(1) - margin * _score_gaps(ranked)[..., None]
    terms = -logsigmoid(torch.where(within, gaps, torch.zeros_like(gaps)))
    means = torch.where(within, terms, torch.zeros_like(terms)).sum(3) / within.sum(3).clamp(min=1)
    return over_pairs(means, ranked.pairs, "mean") + center_rewards_coefficient * _off_centre(ranked)


def quality(ranked: Ranked, *, low: float = 0.0, high: float = 10.0) -> Tensor:
    """Regression on one axis of quality: the score itself is learnt, not the order.

    loss = mean over the responses of |sigmoid(r) - (s - low) / (high - low)|, OpenAssistant's loss on the axes of
    summaries (overall, accuracy, coverage, coherence; scores from 0 to 10). The axis is the judge that is ranked by.

    Args:
        ranked: the lists; ``logps`` are rewards r, ``scores`` s, each from ``low`` to ``high``.
        low: the worst score of the scale.
        high: the best.

    Raises:
        InputError: a score lies beyond the scale.
    """
    scores = present(ranked, ranked.scores)[..., None]
    return axis_regression(present(ranked, ranked.logps)[..., None], scores, ranked.mask, low, high)


def axis_regression(values: Tensor, scores: Tensor, mask: Tensor, low: float = 0.0, high: float = 10.0) -> Tensor:
    """(P,) :func:`quality` on several axes: mean over responses and axes.

    Args:
        values: (P, N, A) what the head says of each response on each axis.
        scores: (P, N, A) scores from ``low`` to ``high``.
        mask: (P, N) which responses there are.
        low: the worst score of the scale.
        high: the best.

    Raises:
        InputError: a score lies beyond the scale.
    """
    return axis_errors(values, scores, mask, low, high).mean(1)


def axis_errors(values: Tensor, scores: Tensor, mask: Tensor, low: float = 0.0, high: float = 10.0) -> Tensor:
    """(P, A) mean over the responses of |sigmoid(value) - target| on each axis; arguments of :func:`axis_regression`.

    Raises:
        InputError: a score lies beyond the scale, or the scale is none.
    """
    check(low < high, f"loss keyword low={low} must be below high={high}")
    targets = (scores - low) / (high - low)
    within = ((targets >= 0) & (targets <= 1)) | ~mask[..., None]
    check(bool(within.all()), f"loss quality: a score lies beyond the scale from {low:g} to {high:g}; set low and high")
    gaps = torch.where(mask[..., None], (torch.sigmoid(values) - targets).abs(), torch.zeros_like(targets))
    return gaps.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _score_gaps(ranked: Ranked) -> Tensor:
    return margins(score_values(ranked), ranked.pairs)


def _off_centre(ranked: Ranked) -> Tensor:
    """(P,) mean over the strict pairs of (r_w + r_l)^2."""
    winners, losers = sides(present(ranked, ranked.logps), ranked.pairs)
    return over_pairs((winners + losers) ** 2, ranked.pairs, "mean")


REWARD_LOSSES: dict[str, Loss] = {
    "bradley_terry": Loss(bradley_terry),
    "plackett_luce": Loss(plackett_luce),
    "per_token": Loss(per_token),
    "quality": Loss(quality, alone=True),
}
