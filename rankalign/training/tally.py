"""What a run has taken so far, time and loss, over all the processes that an interruption split it into."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

KEY = "rankalign_tally"  # in ``trainer_state.json`` of a checkpoint, so that both are whole or neither


class Tally(TrainerCallback):
    """Seconds and summed losses, carried from checkpoint to checkpoint. Work that a kill threw away is not in it.

    Attributes:
        seconds: of earlier processes, up to the checkpoint that this one goes on from.
        loss: sum over the updates before that checkpoint of their losses.
        updates: how many these were.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self.seconds, self.loss, self.updates = 0.0, 0.0, 0
        self._own: Tensor | float = 0.0

    def add(self, loss: Tensor) -> None:
        """Take in a micro-batch's share of an update's loss; nothing waits for the device here."""
        self._own = self._own + loss.detach().double()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read what the checkpoint carries; one of version 0.1.0 carries nothing."""
        told = state.stateful_callbacks.get(KEY) if isinstance(state.stateful_callbacks, dict) else None
        if state.global_step and told:
            self.seconds, self.loss, self.updates = told["seconds"], told["loss"], told["updates"]
        self._own = 0.0

    def total_seconds(self) -> float:
        """Of all processes so far."""
        return self.seconds + time.time() - self.started

    def keep(self, state: Any, accelerator: Any) -> None:
        """Put the tally into the state that a checkpoint is about to hold; all ranks must come here."""
        loss = self.loss + self._mean_over_ranks(accelerator)
        state.stateful_callbacks[KEY] = {
            "seconds": self.total_seconds(),
            "loss": loss,
            "updates": state.global_step,
        }

    def whole(self, logs: dict[str, float], state: Any, accelerator: Any) -> dict[str, float]:
        """The trainer's last line, which knows its own process alone, for the whole run; all ranks must come here."""
        own = state.global_step - self.updates
        if not self.updates or own <= 0:
            return logs
        runtime = logs["train_runtime"]
        total = self.seconds + runtime
        samples = logs["train_samples_per_second"] * runtime / own * state.global_step
        return {
            **logs,
            "train_runtime": total,
            "train_samples_per_second": samples / total,
            "train_steps_per_second": state.global_step / total,
            "train_loss": (self.loss + self._mean_over_ranks(accelerator)) / state.global_step,
        }

    def _mean_over_ranks(self, accelerator: Any) -> float:
        """Each rank's loss is scaled so that the mean over ranks is that of the update."""
        own = torch.as_tensor(self._own, dtype=torch.float64, device=accelerator.device)
        return float(accelerator.reduce(own, "mean"))
