"""Comparisons with the trainers of TRL that sample, on one prompt's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankalign.losses import LOSSES

from .lists import Candidate
from .rows import CLOSE, Errors, Row, from_leaf, tensors

# loss, keywords, label, and whether TRL's value is the loss's: on policy it has the gradient alone, its value is 0
ONLINE: tuple[tuple[str, dict[str, Any], str, bool], ...] = (
    ("rloo", {}, "RLOOTrainer, ratio 1", False),
    ("rloo_clipped", {}, "RLOOTrainer", True),
    ("grpo", {}, "GRPOTrainer `grpo`, ratio 1", False),
    ("dr_grpo", {"max_tokens": 16}, "GRPOTrainer `dr_grpo`, ratio 1", False),
    ("gspo", {}, "GRPOTrainer, by sequence", True),
    ("gspo", {"epsilon_low": 0.1, "epsilon_high": 0.3}, "GRPOTrainer, by sequence", True),
    ("a_star_po", {"beta1": 0.5, "beta2": 0.2}, "A2POTrainer", True),
)


class Answers(NamedTuple):
    """One prompt's answers, (N,) each."""

    logps: Tensor
    refs: Tensor
    lengths: Tensor
    scores: Tensor


def theirs(name: str, answers: Answers, keywords: dict[str, Any]) -> Tensor:
    """TRL's loss."""
    from . import trl_online as trl

    logps, refs, lengths, scores = answers
    clip = keywords.get("epsilon_low", 3e-4), keywords.get("epsilon_high", 4e-4)
    oracles: dict[str, Callable[[], Tensor]] = {
        "rloo": lambda: trl.rloo(logps, logps.detach(), lengths, scores),
        "rloo_clipped": lambda: trl.rloo(logps, refs, lengths, scores),
        "grpo": lambda: trl.grpo(logps, lengths, trl.standardised(scores), "grpo"),
        "dr_grpo": lambda: trl.grpo(logps, lengths, scores - scores.mean(), "dr_grpo", max_tokens=16),
        "gspo": lambda: trl.grpo(logps, lengths, trl.standardised(scores), "grpo", refs, epsilon=clip),
        "a_star_po": lambda: trl.a2po(logps, refs, scores, keywords["beta1"], keywords["beta2"]),
    }
    return oracles[name]()


def online_row(name: str, keywords: dict[str, Any], label: str, has_value: bool, data: list[list[Candidate]]) -> Row:
    """Over the lists in which somebody beats somebody."""
    errors = Errors()
    for candidates in data:
        leaf, refs, lengths, pairs = tensors(candidates)
        if len(pairs):
            scores = torch.tensor([c.score for c in candidates], dtype=torch.float64)
            ours = LOSSES[name].function(from_leaf(leaf, candidates), **keywords).squeeze(0)
            other = theirs(name, Answers(leaf, refs, lengths, scores), keywords)
            errors.add(ours, other if has_value else other - other.detach() + ours.detach(), leaf)
    return errors.row(name, f"TRL {label}" + ("" if has_value else ", gradient"), keywords, CLOSE)
