"""Policy gradients over a list of answers that the policy wrote; the list's scores give the advantages.

u = log(policy / reference) of a response, r its score, A its advantage, which gets no gradient. Two kinds:

* on policy (``rloo``, ``rloo_kl``, ``grpo``, ``dr_grpo``): the ratio of the policy to the one that sampled is 1, as in
  the first update after sampling, and the loss is -A times the log-prob, whose gradient is the method's there. Its
  value says nothing of progress.
* with clipped ratios (``rloo_clipped``, ``gspo``): the reference is the policy that sampled, as it is in a round that
  starts from the model whose answers it learns from (not where the reference stays the first model); several updates
  may follow. Ratios are those of whole responses.

Lists in which nobody beats anybody have no advantages and give 0. Scores count with their scale except in ``grpo`` and
``gspo``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankalign.losses.core import (
    EXPONENT_LIMIT,
    Summed,
    Terms,
    check,
    deviations,
    lengths,
    log_ratios,
    over_candidates,
    policy_scores,
    present,
    usable,
)
from rankalign.losses.ranked import Ranked


def rloo(ranked: Ranked) -> Tensor:
    """RLOO: REINFORCE with the mean score of the other answers as baseline.

    A_i = r_i - mean of r_j over j != i; loss = -mean over i of A_i * logps_i.
    Ahmadian et al. 2024, Back to Basics (arXiv:2402.14740), the RLOO estimator, on policy.

    Args:
        ranked: the lists.
    """
    return usable(ranked, _reinforce(ranked, _leave_one_out(ranked, deviations(ranked)), 0.0))


@Summed
def rloo_kl(ranked: Ranked, *, beta: float = 0.05) -> Terms:
    """RLOO with KL: leave-one-out of the score less the price of having left the reference.

    R_i = r_i - beta * u_i, A_i = R_i - mean of R_j over j != i; loss = -mean over i of A_i * logps_i.
    Ahmadian et al. 2024 (arXiv:2402.14740), the RLOO estimator on the KL-shaped reward, on policy. Its two terms, of
    the scores and of the log-ratios, are logged apart.

    Args:
        ranked: the lists, with reference log-probs.
        beta: price of a nat.
    """
    drift = log_ratios(ranked).detach()
    drift = present(ranked, drift - over_candidates(ranked, drift).unsqueeze(1))
    return {
        "rank_loss": (1.0, rloo(ranked)),
        "kl_loss": (beta, -_reinforce(ranked, _leave_one_out(ranked, drift), 0.0)),
    }


def rloo_clipped(ranked: Ranked, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2) -> Tensor:
    """RLOO with clipped ratios: leave-one-out advantages over several updates after sampling.

    c = e^u, the ratio of the response; loss = -mean over i of min(c_i A_i, clip(c_i, 1 - eps_low, 1 + eps_high) A_i).
    Ahmadian et al. 2024 (arXiv:2402.14740) with the ratio of Schulman et al. 2017, PPO (arXiv:1707.06347), as TRL's
    RLOOTrainer; the reference is the policy that sampled.

    Args:
        ranked: the lists, with the log-probs at sampling as reference.
        epsilon_low: how far a ratio may fall below 1 and still learn.
        epsilon_high: how far it may rise above.
    """
    return _clipped(ranked, log_ratios(ranked), _leave_one_out(ranked, deviations(ranked)), epsilon_low, epsilon_high)


def grpo(ranked: Ranked, *, std_epsilon: float = 1e-4) -> Tensor:
    """GRPO: advantages in standard deviations of the list, each response's log-prob a token.

    A_i = (r_i - mean r) / (std r + std_epsilon); loss = -mean over i of A_i * logps_i / lengths_i.
    Shao et al. 2024, DeepSeekMath (arXiv:2402.03300), eq. 3 on policy and without its KL term, which reads token
    log-probs. Dividing by the length lowers the price of long wrong answers, dividing by the deviation raises the
    weight of lists that are nearly all right or all wrong: both are biases, see ``dr_grpo``.

    Args:
        ranked: the lists.
        std_epsilon: added to the standard deviation (of a sample, N - 1).
    """
    return usable(ranked, _reinforce(ranked, _standardised(ranked, std_epsilon), 1.0))


def dr_grpo(ranked: Ranked, *, max_tokens: float = 1.0) -> Tensor:
    """Dr. GRPO: GRPO without its two biases, by neither length nor deviation.

    loss = -mean over i of (r_i - mean r) * logps_i / max_tokens.
    Liu et al. 2025, Understanding R1-Zero-Like Training (arXiv:2503.20783), section 3.2, on policy.

    Args:
        ranked: the lists.
        max_tokens: one constant for all lengths, such as the longest answer allowed; it only scales the loss.
    """
    check(max_tokens > 0, f"loss keyword max_tokens={max_tokens} must be above 0")
    return usable(ranked, _reinforce(ranked, deviations(ranked), 0.0)) / max_tokens


def gspo(ranked: Ranked, *, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4, std_epsilon: float = 1e-4) -> Tensor:
    """GSPO, offline GRPO by responses: clipped ratios a token of whole responses, for several updates after sampling.

    c = e^(u / length), A as in GRPO; loss = -mean over i of min(c_i A_i, clip(c_i, 1 - eps_low, 1 + eps_high) A_i).
    Zheng et al. 2025, GSPO (arXiv:2507.18071), eqs. 5 to 7; the reference is the policy that sampled.

    Args:
        ranked: the lists, with the log-probs at sampling as reference.
        epsilon_low: how far a ratio may fall below 1 and still learn.
        epsilon_high: how far it may rise above.
        std_epsilon: added to the standard deviation of the scores.
    """
    ratios = log_ratios(ranked) / lengths(ranked)
    return _clipped(ranked, ratios, _standardised(ranked, std_epsilon), epsilon_low, epsilon_high)


def _leave_one_out(ranked: Ranked, apart: Tensor) -> Tensor:
    """(P, N) each value less the mean of the others, from values less the mean of all: N / (N - 1) times those."""
    count = ranked.mask.sum(1, keepdim=True).to(apart.dtype)
    return apart * count / (count - 1).clamp(min=1)


def _standardised(ranked: Ranked, std_epsilon: float) -> Tensor:
    """(P, N) scores less their mean, over their standard deviation."""
    check(std_epsilon >= 0, f"loss keyword std_epsilon={std_epsilon} must be at least 0")
    apart = deviations(ranked)
    count = ranked.mask.sum(1, keepdim=True).to(apart.dtype)
    spread = ((apart**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + std_epsilon
    return apart / torch.where(spread > 0, spread, 1)


def _reinforce(ranked: Ranked, advantages: Tensor, length_penalty: float) -> Tensor:
    return over_candidates(ranked, -advantages * policy_scores(ranked, length_penalty))


def _clipped(ranked: Ranked, log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """(P,) PPO's surrogate; exponents are cut at 80, where fp32 ends."""
    check(0 <= low < 1 and high >= 0, f"loss keywords epsilon_low={low}, epsilon_high={high}: in [0, 1) and at least 0")
    ratio = log_ratio.clamp(max=EXPONENT_LIMIT).exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    return usable(ranked, over_candidates(ranked, -torch.minimum(ratio * advantages, bounded * advantages)))
