"""Whether a run should compute its layers again in backward, by what a plan of it foresees on this GPU."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from rankalign.models import devices
from rankalign.training.defaults import Choice
from rankalign.training.plan import plan

ROOM = 0.9  # share of a GPU's memory that a plan may fill: the allocator's holes and the context of CUDA take the rest


def checkpointing(config: Any) -> list[Choice]:
    """The choice of ``gradient_checkpointing``, made where nobody gave it and a GPU trains; none elsewhere.

    Args:
        config: a TrainConfig, which the choice is put into.
    """
    if not config.may_checkpoint or devices.device().type != "cuda":
        return []
    yes, why = _verdict(config)
    config.gradient_checkpointing = config.activation_checkpointing = yes
    return [Choice("gradient_checkpointing", yes, why)]


def _verdict(config: Any) -> tuple[bool, str]:
    if config.sharded:
        return False, "no plan is made for sharded runs; give it where memory runs out"
    try:
        room = torch.cuda.get_device_properties(devices.device()).total_memory
        with contextlib.redirect_stderr(io.StringIO()):  # what it says of the data is said again by the run
            peak = plan(config, device_memory=str(room))["peak_memory_bytes"]
    except Exception as error:
        return False, f"no plan could be made: {' '.join(str(error).split())[:80]}"
    foreseen = f"{peak / 2**30:.3g} of {room / 2**30:.3g} GiB foreseen without"
    return peak > ROOM * room, foreseen
