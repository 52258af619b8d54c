"""The arithmetic of ILQL (Snell et al. 2022, arXiv:2206.11871), with the losses as trlX has them, as pure functions.

Tensors are flat: the T tokens of a batch's responses, response after response, with no padding. ``ends`` (T,) is True
at the last token of each response. One token is one action, taken in the state of all text before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def standardised(returns: Tensor) -> Tensor:
    """(N,) returns less their mean, over their standard deviation (that of a sample) where there is one above 0."""
    centred = returns - returns.mean()
    spread = centred.std() if len(returns) > 1 else centred.new_zeros(())
    return centred / spread if spread > 0 else centred


def rewards_at_ends(returns: Tensor, ends: Tensor) -> Tensor:
    """(T,) rewards a token: the return (N,) of each response at its last token, 0 before it."""
    return torch.zeros(len(ends), dtype=returns.dtype, device=ends.device).masked_scatter(ends, returns.to(ends.device))


def next_values(values: Tensor, ends: Tensor) -> Tensor:
    """(T,) value of the state that each token leads to; 0 behind the last token of a response."""
    return torch.cat([values[1:], values.new_zeros(1)]).masked_fill(ends, 0.0)


def taken(q: Tensor, actions: Tensor) -> Tensor:
    """(T,) values of the tokens that were written, of (T, V) values of all tokens."""
    return q.gather(1, actions.unsqueeze(1)).squeeze(1)


def least(qs: Sequence[Tensor]) -> Tensor:
    """The smaller of what several heads say: over-estimates are not believed."""
    return torch.stack(list(qs)).amin(0)


def q_loss(qs: Sequence[Tensor], actions: Tensor, rewards: Tensor, following: Tensor, gamma: float) -> Tensor:
    """Squared temporal difference, a mean over tokens, summed over heads: (Q(s, a) - r - gamma V(s'))^2.

    Args:
        qs: (T, V) a head.
        actions: (T,) token ids.
        rewards: (T,).
        following: (T,) V(s'), without gradient.
        gamma: discount.
    """
    wanted = rewards + gamma * following.detach()
    return torch.stack([(taken(q, actions) - wanted).square().mean() for q in qs]).sum()


def expectile_loss(values: Tensor, targets: Tensor, tau: float) -> Tensor:
    """Asymmetric square, a mean over tokens: tau (Q - V)^2 where Q is not below V, (1 - tau) (Q - V)^2 where it is.

    Args:
        values: (T,) V(s).
        targets: (T,) Q(s, a) of the target heads, without gradient.
        tau: above 0.5 V leans to the better actions; towards 1 it becomes their maximum.
    """
    difference = targets.detach() - values
    weights = torch.where(difference >= 0, difference.new_tensor(tau), difference.new_tensor(1 - tau))
    return (weights * difference.square()).mean()


def cql_loss(qs: Sequence[Tensor], actions: Tensor) -> Tensor:
    """Conservative term, a mean over tokens, summed over heads: -log softmax(Q(s, .)) at the token written."""
    return torch.stack([cross_entropy(q, actions) for q in qs]).sum()


def awac_loss(logps: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """Likelihood weighted by advantage, a mean over tokens: -exp(beta (Q - V)) log pi(a | s).

    Args:
        logps: (T,) of the tokens written.
        advantages: (T,) Q - V; no gradient goes through them.
        beta: 0 weighs all tokens alike.
    """
    return -((beta * advantages.detach()).exp() * logps).mean()


def steered_logits(logits: Tensor, q: Tensor, values: Tensor, beta: float, top_k: int = 0) -> Tensor:
    """What ILQL samples from: log pi(. | s) + beta (Q(s, .) - V(s)), all but the ``top_k`` largest at minus infinity.

    Args:
        logits: (B, V) of the policy.
        q: (B, V), the smaller of the target heads.
        values: (B,).
        beta: 0 is the policy.
        top_k: 0 keeps all.
    """
    scores = logits.log_softmax(-1) + beta * (q - values.unsqueeze(1))
    if not 0 < top_k < scores.shape[1]:
        return scores
    floor = scores.topk(top_k).values[:, -1:]
    return scores.masked_fill(scores < floor, float("-inf"))


@torch.no_grad()
def polyak(targets: Iterable[Tensor], sources: Iterable[Tensor], alpha: float) -> None:
    """Move targets a share ``alpha`` of the way to their sources, in place."""
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, alpha)
