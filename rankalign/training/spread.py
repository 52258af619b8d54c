"""Loading where the processes share the weights, by FSDP2 or ZeRO-3: each reads its own part from the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rankalign.models import load as models
from rankalign.models import reward_heads, saving, sharded, value_heads
from rankalign.training import processes
from rankalign.training.arguments import TrainConfig
from rankalign.training.inputs import as_trained
from rankalign.training.reward import made_ready


def by_parts(config: TrainConfig) -> str:
    """How a run spreads the weights while they load: ``fsdp``, ``zero3``, or nothing where each process has them all.

    They are all loaded everywhere, too, by FSDP's first version, and for reward models under ZeRO-3.
    """
    if config.method not in ("rank", "sft", "reward") or PartialState().num_processes == 1:
        return ""
    plugin = config.deepspeed_plugin
    if plugin is not None:
        return "zero3" if plugin.zero_stage == 3 and config.method != "reward" else ""
    return "fsdp" if processes.fsdp_version(config) == 2 else ""


def load(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """The start model, spread, with its adapter if it has one; None where it cannot be read by parts.

    Args:
        config: settings, for which :func:`by_parts` names a way.
        tokenizer: the model's, of which a reward model may change what it pads with.

    Raises:
        InputError: the model cannot be had or lacks weights, or accelerate started another kind of processes.
    """
    way = by_parts(config)
    where, adapter = models.base_and_adapter(config.model, "")
    folder = models.local_folder(where)
    why = _whole_because(config, folder, adapter)
    if why:
        print(f"loading: {why}, so each process reads them all", file=sys.stderr)
        return None
    model, head = _outlined(config, way, where, folder, tokenizer)
    with sharded.nothing_to_meta(), sharded.lengths_from_files(model, folder):
        if adapter:
            model = models.with_adapter(model, adapter, is_trainable=config.use_lora)
        model = as_trained(config.model_settings, model, config.weights_dtype)
    found = sharded.sources(model, where, folder, head)
    if way == "zero3":
        sharded.fill(model, found, {})
    else:
        aside = sharded.set_aside(model) | sharded.new_head(model, head, found)
        model, device = _shard(config, model)
        sharded.fill(model, found, aside, device)
    _follow(model, models.device())
    print(f"loading: each of {PartialState().num_processes} processes has read its own part", file=sys.stderr)
    return model.eval()


def _whole_because(config: TrainConfig, folder: Path, adapter: str) -> str:
    """Why the weights cannot be read by parts, as far as it can be told from the folders; nothing where they can."""
    if adapter:
        told = json.loads((Path(adapter) / "adapter_config.json").read_text())
        more = [name for name in ("modules_to_save", "trainable_token_indices") if told.get(name)]
        return f"the adapter has weights beside its own ({more[0]})" if more else ""
    own_head = value_heads.has_value_head(str(folder)) or reward_heads.is_gated(str(folder))
    return "the head is not transformers' own" if config.method == "reward" and own_head else ""


def _outlined(
    config: TrainConfig, way: str, where: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, dict[str, Tensor]]:
    """The bare model without weights; and what a head that grades starts from, where the files have none."""
    reward, axes = config.method == "reward", config.data_settings.axis_names
    dtype = models.pick_dtype(config.weights_dtype)
    if way == "zero3":  # whose engine takes no other weights than those of its own precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, dtype)
    with models.explained(where):
        told: Any = AutoConfig.from_pretrained(folder, **({"num_labels": max(len(axes), 1)} if reward else {}))
        told._name_or_path = where
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        model = sharded.outline(kind, told, dtype, _zero_config(config) if way == "zero3" else None)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    saving.repair_generation(model, where)
    models.train_every_row(model)
    if not reward:
        return model, {}
    if dtype.itemsize == 2:
        models.widen_head(model, folder)
    body = f"{model.base_model_prefix}."
    head = {name: p for name, p in model.named_parameters() if not name.startswith(body)}
    spread = getattr(told, "initializer_range", 0.02)
    # Of the same seed in every process, which each keep their rows of it.
    return made_ready(model, config.model, tokenizer, config.pooling, axes), {
        name: torch.empty(p.shape, dtype=p.dtype).normal_(0, spread) for name, p in head.items()
    }


def _shard(config: TrainConfig, model: Any) -> tuple[Any, torch.device]:
    """An outline as accelerate would wrap a model in FSDP2, and where its shards are to lie."""
    plugin = FullyShardedDataParallelPlugin(**config.fsdp_plugin_args) if config.fsdp_plugin_args else None
    accelerator = Accelerator(mixed_precision=config.mixed_precision, fsdp_plugin=plugin)
    processes.check_type(accelerator.distributed_type, config.fsdp, config.deepspeed)
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # else accelerate wants the first process to have all weights
    plugin.set_auto_wrap_policy(model)
    processes.keep_digits(plugin)
    if plugin.activation_checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return fsdp2_prepare_model(accelerator, model), torch.device("cpu") if offload else accelerator.device


def _follow(model: Any, device: torch.device) -> None:
    """Bring to the device what no shard is made of: buffers, and adapters beside weights of ZeRO-3."""
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = value.to(device) if value is not None else None
        for value in module._parameters.values():
            if value is not None and not isinstance(value, DTensor) and not hasattr(value, "ds_id"):
                value.data = value.data.to(device)


def _zero_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings as far as they are known before there is a trainer, which fills in what is ``auto``."""
    plugin: Any = config.deepspeed_plugin
    told = getattr(plugin, "dschf", None)
    known = _without_auto(told.config if told is not None else plugin.deepspeed_config)
    kinds = {kind: {**known.get(kind, {}), "enabled": config.precision == kind} for kind in ("bf16", "fp16")}
    return {"train_micro_batch_size_per_gpu": 1, **known, **kinds}


def _without_auto(told: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in told.items()}
    return {key: value for key, value in inner.items() if value != "auto"}
