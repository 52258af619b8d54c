"""Logits to tokens, as pure functions: filters, draws by inverse CDF, and the uniforms that every answer owns."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from rankalign.engines import SamplingParams

# A nucleus seldom holds more tokens than this; sorting the whole vocabulary is ten times the work of finding so many.
NUCLEUS = 1024


def probabilities(logits: Tensor, params: SamplingParams, width: int = 0) -> Tensor:
    """What a token is drawn from: softmax(logits / temperature), then ``top_k``, ``top_p``, ``min_p``, in this order.

    ``top_p`` (nucleus sampling, Holtzman et al. 2020) counts mass among the ``top_k`` tokens, ``min_p`` (Nguyen et al.
    2024) is relative to the likeliest token. Tokens exactly as likely as the last one kept are kept too, so that no
    order among equals matters.

    Args:
        logits: (R, V), any floating type.
        params: ``temperature`` must be above 0.
        width: how many likeliest tokens are sorted for ``top_p``; 0 sorts as many as it takes.

    Returns:
        (R, V) float32, or float64 for logits of that type; rows sum to 1.
    """
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    probs = torch.softmax(logits.to(wide) / params.temperature, dim=-1)
    if (params.top_k, params.top_p, params.min_p) == (0, 1, 0):
        return probs
    probs = probs.masked_fill(probs < _floor(probs, params, width), 0)
    return probs / probs.sum(dim=-1, keepdim=True)


def _floor(probs: Tensor, params: SamplingParams, width: int) -> Tensor:
    """(R, 1) the smallest probability that all filters let through."""
    floor = params.min_p * probs.amax(dim=-1, keepdim=True)
    if params.top_k == 0 and params.top_p == 1:
        return floor
    likeliest = _descending(probs, params, width)
    mass = likeliest.cumsum(dim=-1, dtype=torch.float64)
    whole = mass[:, -1:] if params.top_k else 1.0
    last = (mass[:, :-1] < params.top_p * whole).sum(dim=-1, keepdim=True)
    return likeliest.gather(-1, last).maximum(floor)


def _descending(probs: Tensor, params: SamplingParams, width: int) -> Tensor:
    """(R, k) the likeliest probabilities in order: ``top_k`` or ``width`` of them, or what the widest nucleus needs."""
    vocabulary = probs.shape[-1]
    if width and not params.top_k:
        return probs.topk(min(width, vocabulary), dim=-1).values
    likeliest = probs.topk(min(params.top_k or NUCLEUS, vocabulary), dim=-1).values
    enough = params.top_k or bool((likeliest.sum(dim=-1) >= params.top_p).all())
    return likeliest if enough else probs.topk(vocabulary, dim=-1).values


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens by inverse CDF: the first whose cumulative probability exceeds the row's uniform number.

    Args:
        probs: (R, V); a token of probability 0 is never drawn.
        uniforms: (R,) float64 in [0, 1).

    Returns:
        (R,) int64.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # of 1e5 small numbers
    aims = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    # A uniform of 0 must not draw a first token of probability 0.
    return torch.searchsorted(cumulative, aims, right=True).squeeze(-1)


def drawn(
    logits: Tensor, params: SamplingParams, uniforms: Tensor, sort_all: bool = False
) -> tuple[Tensor, Tensor | None]:
    """:func:`next_tokens` without waiting for a GPU; the second is whether they are right, None where they always are.

    They are not where the nucleus of a row holds more tokens than were sorted; with ``sort_all`` all are.
    """
    if not logits.is_cuda or params.temperature == 0 or params.top_p == 1 or params.top_k:
        return next_tokens(logits, params, uniforms), None
    if sort_all:
        return draw(probabilities(logits, params, logits.shape[-1]), uniforms), None
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    probs = torch.softmax(logits.to(wide) / params.temperature, dim=-1)
    enough = (probs.topk(min(NUCLEUS, probs.shape[-1]), dim=-1).values.sum(dim=-1) >= params.top_p).all()
    return draw(probabilities(logits, params, NUCLEUS), uniforms), enough


def next_tokens(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """(R, V) logits to (R,) tokens: the likeliest at temperature 0 (the first of equals), else drawn."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(probabilities(logits, params), uniforms)


def uniforms(seed: int, prompt_id: str, policy: str, index: int, count: int) -> Tensor:
    """The random numbers of one answer: a pure function of what it is, whatever batch or library version draws it.

    SHAKE-256 over the JSON list of the arguments, 8 bytes a number, of which the upper 53 bits count.

    Returns:
        (count,) float64 in [0, 1), on the CPU.
    """
    key = json.dumps([seed, prompt_id, policy, index]).encode()
    stream = hashlib.shake_256(key).digest(8 * count)
    words = torch.tensor([int.from_bytes(stream[i : i + 8], "big") >> 11 for i in range(0, len(stream), 8)])
    return words.double() * 2.0**-53
