"""The load-balancing loss of a mixture of experts, by the model's own function, over the texts that are learned from.

transformers computes it of whole padded batches inside the model's forward, which rows do not pass. Here routers are
listened to while a trunk runs. A prompt that is written once for N answers counts N times, as in a padded batch, so the
loss does not depend on how rows are laid out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.rows.own import trunk_of
from rankalign.rows.shrink import class_of
from rankalign.rows.tree import Rows

_BALANCE = "_rankalign_balance"


class Balance:
    """Listens to the routers of a model.

    Args:
        lm: a causal language model of transformers.

    Raises:
        InputError: transformers has no such loss for the model.
    """

    def __init__(self, lm: Any) -> None:
        from transformers.utils.output_capturing import OutputRecorder  # no part of earlier versions

        function: Any = getattr(sys.modules[class_of(lm).__module__], "load_balancing_loss_func", None)
        recorder = (getattr(trunk_of(lm), "_can_record_outputs", None) or {}).get("router_logits")
        if function is None or not isinstance(recorder, OutputRecorder):
            raise InputError(
                f"--router_aux_loss_coef: transformers has no load-balancing loss for {lm.config.model_type} models; "
                "leave it out"
            )
        self._function, self._index = function, recorder.index
        self._routers = [module for module in trunk_of(lm).modules() if isinstance(module, recorder.target_class)]
        self._count, self._chosen = lm.num_experts, lm.num_experts_per_tok
        self._found: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def listen(self, rows: Rows) -> Iterator[None]:
        """Take in the loss of the rows that run in this context.

        Raises:
            InputError: no gradient reaches a router, as in reentrant checkpoints.
        """
        heard: list[Tensor] = []

        def hear(module: nn.Module, inputs: Any, output: Any) -> None:
            logits = output[self._index] if isinstance(output, tuple) else output
            heard.append(logits.flatten(0, -2))

        hooks = [router.register_forward_hook(hear) for router in self._routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        weights = counts(rows).to(rows.ids.device)
        if not any(logits.requires_grad for logits in heard):
            raise InputError(
                "no gradient reaches the routers of experts, which --router_aux_loss_coef is for: leave it out, and "
                "--gradient_checkpointing_kwargs '{\"use_reentrant\": true}' too"
            )
        self._found.append((self._function(tuple(heard), self._count, self._chosen, weights), weights.sum()))

    def take(self) -> Tensor:
        """The loss of all rows that have run since it was last taken, each by its tokens; differentiable."""
        found, self._found = self._found, []
        losses, weights = (torch.stack(some) for some in zip(*found, strict=True))
        return (losses * weights).sum() / weights.sum()


def counts(rows: Rows) -> Tensor:
    """(rows, tokens) how many texts a token is part of: 0 for padding, the number of its answers for a prompt's."""
    found = torch.zeros(rows.ids.shape)
    if rows.forest is None:
        for row, length in enumerate(rows.lengths):
            found[row, :length] = 1
        return found
    for tree in rows.forest.trees:
        found[0, slice(*tree.prompt)] = len(tree.responses)
        for a, b in tree.responses:
            found[0, a:b] = 1
    return found


def balance(lm: Any) -> Balance:
    """Have the routers of a model listened to from now on, whenever it runs with gradients.

    Raises:
        InputError: as :class:`Balance`.
    """
    listener = Balance(lm)
    setattr(lm, _BALANCE, listener)
    return listener


def balance_of(lm: Any) -> Balance | None:
    """Who listens to what runs now."""
    found: Balance | None = vars(lm).get(_BALANCE)
    return found if torch.is_grad_enabled() else None


def own_coefficient(config: Any) -> float:
    """What a model's own configuration weighs the loss by: 0 where it does not ask for it."""
    text = config.get_text_config()
    asked = getattr(text, "output_router_logits", False)
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0) if asked else 0.0
