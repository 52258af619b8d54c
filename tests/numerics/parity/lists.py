"""Lists to compare on: ragged, with ties, and with garbage where there is no candidate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rankalign.losses.ranked import Ranked


@dataclass(frozen=True)
class Candidate:
    """One response as plain numbers; what is said of whole distributions, and who wrote it, follows from them."""

    logp: float
    ref: float
    length: int
    score: float

    @property
    def log_squares(self) -> float:
        return -0.25 * self.length - 0.1

    @property
    def own(self) -> bool:
        return self.length % 2 == 1

    # KL(reference || policy) is taken to be u^2 / (10 * length), so that it has a gradient.


def random_list(size: int, seed: int, scores: list[float] | None = None) -> list[Candidate]:
    """``size`` candidates with log-probs of about -1 a token and log-ratios of a few nats."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(size, 3, generator=generator, dtype=torch.float64)
    lengths = (1 + 9 * uniform[:, 0]).int()
    logps = -lengths * (0.3 + 1.5 * uniform[:, 1])
    refs = logps + 4 * (uniform[:, 2] - 0.5)
    scores = scores or torch.linspace(-1, 1, size)[torch.randperm(size, generator=generator)].tolist()
    return [Candidate(*row) for row in zip(logps.tolist(), refs.tolist(), lengths.tolist(), scores, strict=True)]


def padded(lists: list[list[Candidate]], dtype: torch.dtype = torch.float64) -> Ranked:
    """The lists as one batch whose empty places hold NaN and infinities; ``logps`` is a leaf that takes a gradient."""
    width = max(map(len, lists))

    def field(name: str, garbage: float) -> torch.Tensor:
        rows = [[getattr(c, name) for c in row] + [garbage] * (width - len(row)) for row in lists]
        return torch.tensor(rows, dtype=dtype)

    mask = torch.tensor([[k < len(row) for k in range(width)] for row in lists])
    return with_tokens(
        Ranked(
            logps=field("logp", float("nan")).requires_grad_(),
            lengths=field("length", 0.0),
            scores=field("score", float("nan")),
            mask=mask,
            ref_logps=field("ref", float("inf")),
            prompt_lengths=torch.arange(3, 3 + len(lists)),
        )
    )


def with_tokens(ranked: Ranked) -> Ranked:
    """The same lists with what follows from these sums, see :class:`Candidate`, and log-probs of tokens.

    Token t of a response has a share of its sum that is as t + 1, so that gradients come back to ``logps``; garbage
    stands behind them. A reference's have the same shares.
    """
    sizes = torch.where(ranked.mask, ranked.lengths, torch.zeros_like(ranked.lengths)).long()[:, :, None]
    at = torch.arange(max(int(sizes.max()), 1) + 1)

    def spread(sums: torch.Tensor) -> torch.Tensor:
        shares = ((at + 1) / (sizes * (sizes + 1) / 2).to(sums)).to(sums)
        real = at < sizes
        sums = torch.where(ranked.mask, sums, torch.zeros_like(sums))[:, :, None]
        return torch.where(real, sums * torch.where(real, shares, torch.zeros_like(shares)), torch.nan)

    length = sizes[:, :, 0]
    squares = torch.where(ranked.mask, -0.25 * length.to(ranked.logps) - 0.1, torch.nan)
    ranked = replace(
        ranked, token_logps=spread(ranked.logps), log_squares=squares, own=(length % 2 == 1) | ~ranked.mask
    )
    if ranked.ref_logps is None:
        return ranked
    nothing = torch.zeros_like(ranked.logps)
    u = torch.where(ranked.mask, ranked.logps, nothing) - torch.where(ranked.mask, ranked.ref_logps, nothing)
    kls = torch.where(ranked.mask, u**2 / (10 * length.clamp(min=1)), torch.nan)
    return replace(ranked, ref_token_logps=spread(ranked.ref_logps), ref_kls=kls)


def lists() -> list[list[Candidate]]:
    """Pairs, lists of 3, 4 and 6, ties at the bottom, in the middle and throughout, and a lone candidate."""
    return [
        random_list(2, 1),
        random_list(2, 2),
        random_list(3, 3),
        random_list(4, 4),
        random_list(6, 5),
        random_list(4, 6, [0.5, 0.5, 1.0, -0.5]),
        random_list(5, 7, [0.0, 1.0, 0.0, 0.0, 0.25]),
        random_list(3, 8, [1.0, 1.0, 1.0]),
        random_list(1, 9),
    ]


def value_and_gradient(loss: torch.Tensor, leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss and its gradient with respect to ``leaf``, detached."""
    # Kept: several losses are made of the same tokens, which are made of the leaf.
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True, retain_graph=loss.requires_grad)
    return loss.detach(), torch.zeros_like(leaf) if gradient is None else gradient
