"""What of a PPO run differs with its launcher: DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from rankalign.errors import InputError
from rankalign.storage.files import write_text
from rankalign.storage.folders import new_folder
from rankalign.storage.jsonl import dumps
from rankalign.training import processes
from rankalign.training.arguments import PPOConfig
from rankalign.training.ppo import state as ppo_state
from rankalign.training.ppo.value import ActorCritic

SHARDS = "shards"
MADE = "made_by"


def accelerator(config: PPOConfig) -> Accelerator:
    """accelerate, as the settings and the launcher have it.

    Raises:
        InputError: FSDP or DeepSpeed was asked for and is not there.
    """
    fsdp = FullyShardedDataParallelPlugin(**config.fsdp_plugin_args) if config.fsdp_plugin_args else None
    found = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        cpu=config.use_cpu and config.deepspeed_plugin is None,  # else accelerate forgets DeepSpeed
        deepspeed_plugin=config.deepspeed_plugin,
        fsdp_plugin=fsdp,
    )
    processes.check_type(found.distributed_type, config.fsdp, config.deepspeed)
    if found.distributed_type == DistributedType.DEEPSPEED:
        propagate_args_to_deepspeed(found, config)  # type: ignore[no-untyped-call]
        found.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
    elif found.distributed_type == DistributedType.FSDP:
        plugin = found.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # each process has read all weights
        processes.keep_digits(plugin)
        processes.resume_by_shards(plugin)
    return found


def by_shards(accelerator: Accelerator) -> bool:
    """Whether weights, gradients or the optimiser's state are spread over the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def mixed(accelerator: Accelerator) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for a forward of shards; around that of others accelerate has put it."""
    return accelerator.autocast() if by_shards(accelerator) else contextlib.nullcontext()


@torch.no_grad()
def prove(actor: ActorCritic, prompt: Sequence[int]) -> None:
    """Have an actor looked at once while it has all its weights: how its head and its rows are computed is tried on
    them.

    Args:
        actor: not wrapped yet.
        prompt: token ids.
    """
    actor([list(prompt)], [list(prompt[:1])])


@contextlib.contextmanager
def part(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[Callable[[Tensor], None]]:
    """Gives the backward of a micro-batch. Processes add gradients up behind the ``last`` of an update; those that
    share their weights behind each, or one would have the gradient of all weights."""
    if not by_shards(accelerator):
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield accelerator.backward
        return
    # DeepSpeed makes its update in the backward that is said to be the last, and would divide by the micro-batches.
    accelerator.gradient_state._set_sync_gradients(last)
    zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    yield partial(accelerator.backward, scale_wrt_gas=False) if zero else accelerator.backward


def clip(accelerator: Accelerator, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """The norm of the whole gradient, which is clipped to ``most``; DeepSpeed has done so and made its update."""
    norm: Any = accelerator.clip_grad_norm_(parameters, most)
    norm = torch.as_tensor(float("nan") if norm is None else norm, device=accelerator.device)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def save(accelerator: Accelerator, folder: Path, facts: dict[str, Any], keep: int | None) -> None:
    """Write a checkpoint of shards, whole or not at all: each process its own into one folder, which all see.

    Args:
        accelerator: of the run.
        folder: the checkpoint.
        facts: see :func:`rankalign.training.ppo.state.save`.
        keep: see there.
    """
    first = accelerator.is_main_process
    facts = {**facts, MADE: _kind(accelerator)}
    with new_folder(folder) if first else contextlib.nullcontext() as fresh:
        (place,) = broadcast_object_list([str(fresh)])
        accelerator.save_state(f"{place}/{SHARDS}")
        accelerator.wait_for_everyone()
        if first:
            write_text(Path(place) / ppo_state.FACTS, dumps(facts) + "\n")
    if first:
        ppo_state.drop_old(folder, keep)


def load(accelerator: Accelerator, folder: Path) -> None:
    """Put back what :func:`save` has written."""
    accelerator.load_state(str(folder / SHARDS))


def check_made(accelerator: Accelerator, folder: Path, facts: dict[str, Any]) -> None:
    """Refuse a checkpoint that another launcher's processes have written.

    Args:
        accelerator: of the run.
        folder: the checkpoint.
        facts: its own.

    Raises:
        InputError: its shards are not those of this launch, or it has none, or this launch reads none.
    """
    made, here = facts.get(MADE, ""), _kind(accelerator) if by_shards(accelerator) else ""
    if made != here:
        told = [kind or "whole weights" for kind in (made, here)]
        raise InputError(
            f"{folder} was made by {told[0]}, and this launch is {told[1]}; go on as it began, or --overwrite"
        )


def _kind(accelerator: Accelerator) -> str:
    """What the shards hang on: who makes them, and among how many."""
    return f"{accelerator.distributed_type.value} of {accelerator.num_processes} processes"
