"""The names under which TensorBoard, wandb, trackio and others show preference training, as TRL's users know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankalign.losses.ranked import Ranked

MARK = "/"  # none of our own names has it; ``log.jsonl`` is kept without them


class Dashboards:
    """Figures of a list's best and worst answer, for trackers alone.

    Where several answers share the best or the worst score, the first of them stands for it.

    Args:
        beta: scale of the implicit reward beta (log p - log p_ref), of Rafailov et al. 2023 (arXiv:2305.18290), eq. 5.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, ranked: Ranked) -> dict[str, Tensor]:
        """Sums over the prompts, on the device: ``logps/chosen`` and ``logps/rejected``; with a reference also
        ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` and ``rewards/accuracies``."""
        low, high = torch.finfo(ranked.scores.dtype).min, torch.finfo(ranked.scores.dtype).max
        best = ranked.scores.masked_fill(~ranked.mask, low).argmax(1, keepdim=True)
        worst = ranked.scores.masked_fill(~ranked.mask, high).argmin(1, keepdim=True)
        sums = {name: ranked.logps.gather(1, at).sum() for name, at in (("chosen", best), ("rejected", worst))}
        figures = {f"logps/{name}": value for name, value in sums.items()}
        if ranked.ref_logps is None:
            return figures
        reward = self.beta * (ranked.logps - ranked.ref_logps)
        chosen, rejected = reward.gather(1, best), reward.gather(1, worst)
        figures |= {"rewards/chosen": chosen.sum(), "rewards/rejected": rejected.sum()}
        return figures | {
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
        }


def without(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the history as ``log.jsonl`` has it."""
    return {name: value for name, value in line.items() if MARK not in name}
