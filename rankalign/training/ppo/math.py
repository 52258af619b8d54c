"""The arithmetic of PPO on language models, as pure functions over (B, T) tensors, one row a response.

Rows are padded on the right and a boolean mask marks the tokens that count; what stands behind them has no bearing on
any result. One token is one action, a response is one episode: its value after the last token is 0, whether it ended
by itself or was cut at the token limit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankalign.errors import InputError

Score = float | Sequence[float]

# --- masks and padding -------------------------------------------------------------------------------------------


def length_mask(lengths: Sequence[int], width: int = 0, device: torch.device | None = None) -> Tensor:
    """(B, T) bool, True for the first ``lengths[b]`` positions of row b; T is the longest, or ``width`` if larger."""
    counts = torch.tensor(list(lengths), dtype=torch.long, device=device)
    return torch.arange(max(width, *lengths), device=device) < counts[:, None]


def end_mask(ids: Tensor, ends: Collection[int]) -> Tensor:
    """Tokens that belong to a response.

    Args:
        ids: (B, T) int64 as sampled, whatever stands behind the end.
        ends: ids that end a response.

    Returns:
        (B, T) bool, True up to and with the first end of each row, and for all of a row without one.
    """
    is_end = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype, device=ids.device))
    return is_end.cumsum(1) - is_end.long() == 0  # the first end itself still counts


def last_index(mask: Tensor) -> Tensor:
    """(B,) int64 position of each row's last True; 0 for a row without one."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """(B, T) with the values of (tokens,) ``flat`` where ``mask`` is True, row after row, and 0 elsewhere."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


# --- moments -----------------------------------------------------------------------------------------------------


def masked_sums(values: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: how many values count, their sum, and the sum of their squares. Sums of processes add up."""
    kept = values[mask].double()
    return torch.stack([kept.new_tensor(float(kept.numel())), kept.sum(), kept.square().sum()])


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (divided by n, not n - 1) from :func:`masked_sums`; 0 and 0 where nothing counts."""
    count = sums[0].clamp(min=1)
    mean = sums[1] / count
    return mean, (sums[2] / count - mean.square()).clamp(min=0)


def masked_whiten(values: Tensor, mask: Tensor, sums: Tensor | None = None) -> Tensor:
    """Values with mean 0 and population variance 1 over the mask, and 0 outside of it.

    Args:
        values: (B, T).
        mask: (B, T) bool.
        sums: of :func:`masked_sums` over more than these values, such as those of all processes.
    """
    mean, variance = moments(masked_sums(values, mask) if sums is None else sums)
    white = (values.double() - mean) * (variance + 1e-8).rsqrt()  # the floor of trlX and TRL
    return torch.where(mask, white, 0.0).to(values.dtype)


@dataclass
class RunningMoments:
    """Mean and population variance of all values seen, batch by batch (Chan, Golub and LeVeque 1979, eq. 1.5)."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, values: Sequence[float]) -> None:
        """Take in more values."""
        if not values:
            return
        n, total = len(values), self.count + len(values)
        mean = math.fsum(values) / n
        squares = math.fsum((value - mean) ** 2 for value in values)
        shift = mean - self.mean
        squares += self.variance * self.count + shift**2 * self.count * n / total
        self.mean, self.variance, self.count = self.mean + shift * n / total, squares / total, total

    @property
    def std(self) -> float:
        """Standard deviation; 1 while nothing varies, so that it can divide."""
        return math.sqrt(self.variance) or 1.0

    def scaled(self, score: Score, kind: str) -> Score:
        """A score under one of :data:`rankalign.training.ppo_settings.SCALES`.

        ``running`` and ``ref`` divide by the standard deviation (of all scores so far, or of the first iteration's);
        ``whiten`` subtracts the running mean as well, which for a score a token is spread over its tokens.
        """
        if kind == "none":
            return score
        shift = self.mean if kind == "whiten" else 0.0
        if isinstance(score, int | float):
            return (score - shift) / self.std
        return [(part - shift / len(score)) / self.std for part in score]


# --- KL ----------------------------------------------------------------------------------------------------------


def kl_per_token(logps: Tensor, ref_logps: Tensor, kind: str = "k1") -> Tensor:
    """KL(policy || reference) at each token, estimated from the token that the policy drew.

    With r = p_ref / p: k1 = -log r and k3 = r - 1 - log r are unbiased, the second never negative and of less variance;
    k2 = (log r)^2 / 2 is biased (Schulman 2020, "Approximating KL Divergence").

    Args:
        logps: (B, T) under the policy, which sampled.
        ref_logps: (B, T) under the reference.
        kind: one of :data:`rankalign.training.ppo_settings.KL_ESTIMATORS`.
    """
    log_ratio = ref_logps - logps
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return log_ratio.expm1() - log_ratio


@dataclass
class KLController:
    """The weight of the KL penalty: fixed, or drawn to a target (Ziegler et al. 2019, section 2.2).

    Attributes:
        coef: the weight now.
        target: wanted KL a response in nats; 0 keeps the weight as it is.
        horizon: responses in which the weight would change by a fifth at most.
    """

    coef: float
    target: float = 0.0
    horizon: float = 10000.0

    def update(self, current: float, count: int) -> None:
        """coef <- coef (1 + e n / horizon), e = current / target - 1 within +-0.2.

        Args:
            current: mean KL a response.
            count: n, how many responses it was measured on.
        """
        if self.target:
            error = min(max(current / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * count / self.horizon


# --- rewards -----------------------------------------------------------------------------------------------------


def total(score: Score) -> float:
    """The score of a whole response."""
    return float(score) if isinstance(score, int | float) else math.fsum(score)


def reference_normalised(scores: Sequence[Score], ids: Sequence[str], baseline: Mapping[str, float]) -> list[Score]:
    """Scores less that of the same prompt's reference answer; a score a token gives way at its last token.

    Args:
        scores: one a response.
        ids: of its prompt.
        baseline: score of the reference answer by prompt id.

    Raises:
        InputError: a prompt without a reference score.
    """
    missing = sorted(set(ids) - set(baseline))
    if missing:
        raise InputError(f"{len(missing)} prompts have no reference score, the first is {missing[0]!r}")
    return [_add_last(score, -baseline[ident]) for score, ident in zip(scores, ids, strict=True)]


def _add_last(score: Score, amount: float) -> Score:
    if isinstance(score, int | float):
        return score + amount
    return [*score[:-1], score[-1] + amount]


def clipped(score: Score, limit: float) -> Score:
    """A score, or each of its parts, within +-``limit``; 0 does not limit."""
    if not limit:
        return score
    if isinstance(score, int | float):
        return min(max(score, -limit), limit)
    return [min(max(part, -limit), limit) for part in score]


def place_scores(scores: Sequence[Score], mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores as rewards of tokens.

    A number lands on the response's last token: its end of sequence where it finished, else the last one written. A
    list of one number counts as a number; a longer list gives its numbers to the first tokens, in order.

    Args:
        scores: B scores.
        mask: (B, T) bool.
        dtype: of the result.

    Raises:
        InputError: a list with more numbers than the response has tokens, or none.
    """
    rewards = torch.zeros(mask.shape, dtype=dtype)
    rows = zip(scores, mask.sum(1).tolist(), last_index(mask).tolist(), strict=True)
    for row, (score, length, last) in enumerate(rows):
        parts = [score] if isinstance(score, int | float) else list(score)
        if not 1 <= len(parts) <= max(length, 1):
            raise InputError(f"a response of {length} tokens got {len(parts)} rewards; give one, or up to one a token")
        start = last if len(parts) == 1 else 0
        rewards[row, start : start + len(parts)] = torch.tensor(parts, dtype=dtype)
    return rewards.to(mask.device)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """R(x, y) - beta KL, token by token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: (B, T) of :func:`place_scores`.
        kl: (B, T) of :func:`kl_per_token`.
        mask: (B, T) bool.
        coef: beta.
    """
    return torch.where(mask, scores - coef * kl, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that values are fitted to.

    A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}) and R_t = A_t + V_t (Schulman et al. 2016,
    arXiv:1506.02438, eq. 16).

    Args:
        rewards: (B, T); what stands outside of the mask is not read, NaN included.
        values: (B, T), V of the text before each token.
        mask: (B, T) bool.
        gamma: discount.
        lam: lambda.

    Returns:
        Advantages and returns, (B, T) each, 0 outside of the mask.
    """
    rewards, values = (torch.where(mask, x, torch.zeros_like(x)) for x in (rewards, values))  # NaN x 0 is NaN
    advantages = torch.zeros_like(values)
    advantage = following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        advantage = (rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage) * inside
        following = values[:, t] * inside
        advantages[:, t] = advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


# --- losses ------------------------------------------------------------------------------------------------------


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, negated: -min(q A, clip(q, 1 - eps, 1 + eps) A) with q = p / p_old.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    Returns:
        The loss of each token, and a bool where the clip decides, of the shape of the arguments.
    """
    ratio = (logps - old_logps).exp()
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.maximum(plain, bounded), bounded > plain


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (V_clip - R)^2) / 2, where V_clip is V within +-``clip_range`` of the value before the update.

    Of OpenAI's PPO code (baselines, ppo2); the paper has eq. 9 without the clip.

    Returns:
        The loss of each token, and a bool where the clip decides, of the shape of the arguments.
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, bounded = (values - returns).square() / 2, (near - returns).square() / 2
    return torch.maximum(plain, bounded), bounded > plain


# --- what to watch -----------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last dimension; logits of -inf add nothing."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the mask: 1 is perfect, 0 as good as a constant; 0 where returns do not vary."""
    rest, whole = (moments(masked_sums(x, mask))[1] for x in (returns - values, returns))
    return torch.where(whole > 0, 1 - rest / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
