"""The routers' load-balancing loss beside a ranking loss, for mixtures of experts."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankalign.errors import InputError
from rankalign.rows.experts import Balance, balance, own_coefficient
from rankalign.rows.logps import causal_lm

NAME = "router_aux_loss"


@dataclass
class RouterLoss:
    """What is added to the loss of each prompt.

    Attributes:
        coefficient: its weight.
        listener: hears the routers of the model.
    """

    coefficient: float
    listener: Balance

    def add(self, losses: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (P,) of a micro-batch, each with the weighted loss of the routers over all of it, and their parts.

        Added to each prompt it enters the mean over an update's prompts as the mean over its micro-batches, by their
        prompts. Without gradients nothing is heard and nothing added.
        """
        if not torch.is_grad_enabled():
            return losses, parts
        own = self.listener.take().to(losses.device, losses.dtype)
        return losses + self.coefficient * own, {**parts, NAME: own.detach().expand(len(losses))}


def router_loss(config: Any, model: Any) -> RouterLoss | None:
    """What the settings, or else the model's own configuration, ask for; None for nothing.

    Args:
        config: a :class:`rankalign.training.arguments.TrainConfig`.
        model: what trains.

    Raises:
        InputError: the model has no routers of which transformers knows such a loss.
    """
    if config.method not in ("rank", "sft"):
        return None
    lm = causal_lm(model)
    asked = config.router_aux_loss_coef
    coefficient = own_coefficient(lm.config) if asked is None else asked
    if not coefficient:
        return None
    if asked is None:
        print(
            f"router_aux_loss_coef {coefficient:g}, as the model's config asks for (0 leaves it out)", file=sys.stderr
        )
    return RouterLoss(coefficient, balance(lm))


def check_coefficient(config: Any) -> None:
    """Refuse a weight that is none, or that nothing reads.

    Raises:
        InputError: naming it.
    """
    given = config.router_aux_loss_coef
    if given is None:
        return
    if not math.isfinite(given) or given < 0:
        raise InputError(f"--router_aux_loss_coef {given:g} is no weight: a number from 0 on")
    if given and config.method not in ("rank", "sft"):
        raise InputError("--router_aux_loss_coef is for --method rank or sft: other models' routers are not balanced")
    if given and config.two_pass == "always":
        raise InputError(f"--router_aux_loss_coef {given:g} is of whole lists: not with --two_pass always")


def refuse_two_passes(asked: RouterLoss | None, tokens: int, budget: int) -> None:
    """Say what to do about a list that does not fit in one pass, in which alone routers are heard.

    Raises:
        InputError: routers are to be heard.
    """
    if asked is not None:
        raise InputError(
            f"a list of {tokens} tokens runs in two passes at --token_budget {budget}, in which the routers of experts "
            "are not balanced: raise it, or give --router_aux_loss_coef 0"
        )
