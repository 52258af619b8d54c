"""Several processes that train one model: who speaks and writes, what accelerate made of the launch, whole weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from rankalign.errors import InputError
from rankalign.models.sharded import has_masters

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process writes files and speaks: the first of all, or the only one."""
    return PartialState().is_main_process


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Drop what processes other than the first print. Errors pass through and are shown by whoever catches them."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def share(everything: Sequence[T]) -> list[T]:
    """This process's part of a list: every n-th of n processes, from its own number on."""
    state = PartialState()
    return list(everything[state.process_index :: state.num_processes])


def together(own: list[T]) -> list[T]:
    """What all processes made of their :func:`share` of a list, one for one, in the order of the list; in each of them.

    Tensors must lie on the CPU where there are several processes.
    """
    count = PartialState().num_processes
    if count == 1:
        return own
    shares = gather_object([own])
    return [shares[i % count][i // count] for i in range(sum(map(len, shares)))]


@contextlib.contextmanager
def whole_weights(config: Any) -> Iterator[None]:
    """Load all weights in every process: layout, reference and fingerprint are computed before they are sharded.

    DeepSpeed's ``zero.Init`` and FSDP's loading on the first process alone would leave the others with parts.

    Args:
        config: transformers' TrainingArguments.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    zero, ram = getattr(config.deepspeed_plugin, "dschf", None), os.environ.get(name)
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    os.environ[name] = "false"  # transformers asks for it while it loads
    try:
        yield
    finally:
        os.environ.pop(name)
        if ram is not None:
            os.environ[name] = ram
        if zero is not None:
            set_hf_deepspeed_config(zero)  # type: ignore[no-untyped-call]


def save_whole(plugin: Any) -> None:
    """Have DeepSpeed gather ZeRO-3's shards whenever it saves a model, so that every folder is a whole model.

    Args:
        plugin: accelerate's DeepSpeedPlugin.
    """
    stage3 = plugin.deepspeed_config.get("zero_optimization", {})
    if stage3.get("stage") == 3:
        stage3["stage3_gather_16bit_weights_on_model_save"] = True


def asked_to_shard(config: Any) -> bool:
    """Whether weights are to be spread over the processes, by a flag or by the launcher.

    Args:
        config: transformers' TrainingArguments.
    """
    env = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") for name in ("FSDP", "DEEPSPEED"))
    return bool(config.fsdp) or config.deepspeed is not None or env


def fsdp_version(config: Any) -> int:
    """1 or 2 where FSDP was asked for, by a flag or by ``accelerate launch``; else 0.

    Args:
        config: transformers' TrainingArguments.
    """
    if config.fsdp_plugin_args:
        return int(config.fsdp_plugin_args["fsdp_version"])
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return int(os.environ.get("FSDP_VERSION", "1")) if asked else 0


def spreads_weights(config: Any) -> bool:
    """Whether each of several processes is to hold a part of the weights alone, by FSDP2 or ZeRO-3; for runs that write
    answers between updates.

    Args:
        config: transformers' TrainingArguments.

    Raises:
        InputError: FSDP's first version, which makes one flat tensor of a layer's weights.
    """
    if PartialState().num_processes == 1:
        return False
    if fsdp_version(config) == 1:
        raise InputError("FSDP's first version cannot write answers between updates: take FSDP2 (fsdp_version 2)")
    plugin = config.deepspeed_plugin
    return fsdp_version(config) == 2 or (plugin is not None and plugin.zero_stage == 3)


def layers_in(accelerator: Any) -> torch.dtype | None:
    """The type in which spread layers have their weights while they compute; None where it is that of the shards.

    Args:
        accelerator: accelerate's Accelerator.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        found: torch.dtype | None = getattr(accelerator.state.fsdp_plugin.mixed_precision_policy, "param_dtype", None)
        return found
    zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision) if zero else None


def keep_digits(plugin: Any) -> None:
    """Have FSDP2 under mixed precision hand on float32 log-probabilities, and add gradients up in float32.

    accelerate's policy casts what a forward returns, and our rows' log-probabilities are returned by one, to 16 bits,
    and adds the gradients of all processes in 16 bits. Weights and products stay in 16 bits.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, or None. A policy that is not accelerate's own stays.
    """
    policy = getattr(plugin, "mixed_precision_policy", None)
    narrow = (torch.bfloat16, torch.float16)
    if not isinstance(policy, MixedPrecisionPolicy) or policy.output_dtype not in narrow:
        return
    if policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def take_spread(accelerator: Any, model: nn.Module) -> None:
    """Have accelerate take a model as it is that FSDP2 has spread before there was a trainer.

    accelerate would find each weight's new shard by the address of the old one, and all empty shards have one address.

    Args:
        accelerator: the trainer's.
        model: the trainer's.
    """

    def prepare(*things: Any, **more: Any) -> Any:
        if not things or things[0] is not model:
            return type(accelerator).prepare(accelerator, *things, **more)
        accelerator._models.append(model)
        return model, accelerator.prepare_optimizer(things[1])

    accelerator.prepare = prepare


def resume_by_shards(plugin: Any) -> None:
    """Have accelerate keep what a run resumes from in shards, so that no process holds the whole model for a moment.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, of FSDP2.
    """
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # made for whole ones, where those were asked for
    plugin.set_state_dict_type("SHARDED_STATE_DICT")


def check_type(kind: DistributedType, fsdp: Any, deepspeed: Any) -> None:
    """Refuse to go on with plain data parallelism where shards were asked for, which accelerate does on CPUs.

    Args:
        kind: what the launch came to.
        fsdp: whether FSDP was asked for by a flag; ``accelerate launch --use_fsdp`` is seen in the environment.
        deepspeed: whether DeepSpeed was asked for by a flag.

    Raises:
        InputError: FSDP or DeepSpeed was asked for and is not there.
    """
    for name, wanted, asked in (("FSDP", "FSDP", fsdp), ("DeepSpeed", "DEEPSPEED", deepspeed)):
        env = os.environ.get(f"ACCELERATE_USE_{wanted}", "false").lower() in ("true", "1")
        if (asked or env) and kind != DistributedType[wanted]:
            raise InputError(f"{name} was asked for, but accelerate started {kind.value}; FSDP needs GPUs")


def describe(kind: DistributedType, model: nn.Module) -> str:
    """One line on how a model is spread, to be printed once it is wrapped."""
    text = f"distributed: {PartialState().num_processes} processes, {kind.value}, model in {type(model).__name__}"
    units = sorted({_plain_name(m) for m in model.modules() if m is not model and isinstance(m, FSDPModule)})
    if has_masters(model):
        return f"{text}, which rounds the start weights to 16 bits and trains float32 copies of those"
    return f"{text}, shards of {', '.join(units)}" if units else text


def _plain_name(module: nn.Module) -> str:
    """The name of the class that FSDP2 put its own on top of."""
    return type(module).__name__.removeprefix("FSDP")
