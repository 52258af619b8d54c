"""The tensors a ranking loss reads: P prompts with up to N candidates each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """Candidates of P prompts, padded to the longest list; entries where ``mask`` is False mean nothing.

    Attributes:
        logps: (P, N) sum of the log-probabilities (nats) of each response's tokens under the policy, fp32 or wider.
        lengths: (P, N) how many tokens each response has, its end-of-sequence token included.
        scores: (P, N) score of each response, finite where ``mask``; higher is better.
        mask: (P, N) True where a candidate exists.
        ref_logps: (P, N) the same sums under the reference model, or None for losses that need none.
        prompt_lengths: (P,) tokens of each prompt; only ``compat`` modes that divide by padded lengths read it.
        token_logps: (P, N, T) the log-probability of each counted token of a response, in order; what lies beyond its
            length means nothing. None for losses that read sums alone.
        ref_token_logps: (P, N, T) the same under the reference model.
        log_squares: (P, N) sums over the counted tokens of log sum_v p_v^2 under the policy; no gradient.
        ref_kls: (P, N) sums over the counted tokens of KL(reference || policy), nats.
        own: (P, N) bool, True where the policy that trains wrote the response.
        seeds: (P,) a number of the prompt's own, by which losses that draw tokens draw them; None is 0 for all.
    """

    logps: Tensor
    lengths: Tensor
    scores: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    prompt_lengths: Tensor | None = None
    token_logps: Tensor | None = None
    ref_token_logps: Tensor | None = None
    seeds: Tensor | None = None
    log_squares: Tensor | None = None
    ref_kls: Tensor | None = None
    own: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.logps.shape
        if self.logps.dim() != 2:
            raise ValueError(f"logps must be (P, N), got shape {tuple(shape)}")
        for name in ("lengths", "scores", "mask", "ref_logps", "log_squares", "ref_kls", "own"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must have the shape of logps {tuple(shape)}, got {tuple(value.shape)}")
        for name in ("token_logps", "ref_token_logps"):
            value = getattr(self, name)
            if value is not None and (value.dim() != 3 or value.shape[:2] != shape):
                raise ValueError(f"{name} must be {(*shape, 'T')}, got {tuple(value.shape)}")

    @property
    def pairs(self) -> Tensor:
        """(P, N, N) bool: ``[p, i, j]`` is True where i scores strictly above j. Ties make no pair."""
        both = self.mask.unsqueeze(2) & self.mask.unsqueeze(1)
        return both & (self.scores.unsqueeze(2) > self.scores.unsqueeze(1))

    @property
    def best(self) -> Tensor:
        """(P,) index of the highest score; the first of equals."""
        return self.scores.masked_fill(~self.mask, -torch.inf).argmax(dim=1)

    @property
    def worst(self) -> Tensor:
        """(P,) index of the lowest score; the last of equals, so that best and worst differ in any list of two."""
        flipped = self.scores.masked_fill(~self.mask, torch.inf).flip(1)
        return self.scores.shape[1] - 1 - flipped.argmin(dim=1)
