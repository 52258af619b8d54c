"""Old names of settings: the command lines of RRHF, Open-ChatGPT, Stanford Alpaca and TRL, under present ones."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from transformers import TrainingArguments

from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.losses.reward import REWARD_LOSSES
from rankalign.storage.files import read_text
from rankalign.storage.jsonl import loads
from rankalign.training.foreign_names import TOOLS
from rankalign.training.ppo_settings import PPOSettings
from rankalign.training.settings import FLASH, GROUPS

_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "model_name_or_path": "model",
    "model_max_length": "max_length",
    "data_path": "data",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "lora_target": "lora_target_modules",
    "use_peft": "use_lora",
    "loss_type": "loss",
    "rpo_alpha": "nll_weight",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "attn_implementation": "flash_attention",
}
_OLD_VALUES = {
    ("optim", "adamw_hf"): "adamw_torch",  # transformers' own AdamW is gone
    ("loss", "sigmoid"): "dpo",  # TRL's names of losses
    ("loss", "exo_pair"): "exo",
    ("loss", "nca_pair"): "nca",
    ("loss", "bco_pair"): "bco",
    ("loss", "sppo_hard"): "sppo",
    **{("flash_attention", f"flash_attention_{n}"): f"fa{n}" for n in (2, 3, 4)},
}
_IGNORED = {
    "fsdp_transformer_layer_cls_to_wrap": "the class to wrap is found in the model",
    "overwrite_output_dir": "see --overwrite",
    "cache_dir": "the hub's own cache is used",
    "half_precision_backend": "transformers has one backend now",
    "fp16_opt_level": "apex is gone",
    "fp16_backend": "transformers has one backend now",
    "fsdp_min_num_params": "the class to wrap is found in the model",
    "logging_dir": "the log is log.jsonl in output_dir",
    "save_safetensors": "weights are always saved as safetensors",
}


def modernise(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Old names to present ones.

    Returns:
        The settings under their present names, and one sentence for each that was changed or cannot apply here.
    """
    notes: list[str] = []
    settings: dict[str, Any] = {}
    content = _with_trls_kinds(content, notes)
    for key, value in content.items():
        name = _RENAMED.get(key, key)
        if key == "warmup_ratio":
            _check_ratio(value)
        now = _present(name, value)
        if key not in _RENAMED and key not in _ours():
            name, now = _elsewhere(key, value)
        reason = _IGNORED.get(key) or _without(key, name, now)
        if reason:
            notes.append(f"--{key} is left out: {reason}")
        elif name != key and name in content:
            notes.append(f"--{key} {value} is left out: --{name} is given as well")
        else:
            settings[name] = now
            if (name, now) != (key, value):
                notes.append(f"--{key} {value} is now --{name} {now}")
    return _fit_machine(settings, notes), notes


def _with_trls_kinds(content: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What TRL makes of its sigmoid loss by a setting is a loss of its own here: LD-DPO by ``ld_alpha``, aligned WPO by
    ``use_weighting``.

    Raises:
        InputError: another loss with one of them, or both.
    """
    given = {key: content[key] for key in ("ld_alpha", "use_weighting") if content.get(key) is not None}
    given = {key: value for key, value in given.items() if key == "ld_alpha" or _true(value)}
    rest = {key: value for key, value in content.items() if key not in ("ld_alpha", "use_weighting")}
    if not given:
        return rest
    key = "loss_type" if "loss_type" in rest else "loss"
    loss = rest.get(key)
    (setting, *others), plain = given, [loss] if isinstance(loss, str) else loss
    if others or plain not in (["sigmoid"], ["dpo"]):
        raise InputError(f"--{setting} makes another loss of TRL's sigmoid: --loss_type sigmoid with one such setting")
    name, own = ("ld_dpo", {"alpha": given[setting]}) if setting == "ld_alpha" else ("wpo_aligned", {})
    told = " ".join(["--loss", name, *(f"--{option} {value}" for option, value in own.items())])
    notes.append(f"--{key} {plain[0]} --{setting} {given[setting]} is now {told}")
    return {**rest, key: name, **own}


@functools.cache
def _ours() -> frozenset[str]:
    """Names that need no table: our settings, transformers' and the losses' keywords."""
    kinds = (*GROUPS, PPOSettings, TrainingArguments)
    keywords = {key for entry in (*LOSSES.values(), *REWARD_LOSSES.values()) for key in entry.defaults}
    return frozenset({item.name for kind in kinds for item in dataclasses.fields(kind)} | keywords)


def _elsewhere(key: str, value: Any) -> tuple[str, Any]:
    """A name that other trainers have, where all that have it mean one setting of ours; else as it came."""
    tools = [tool for tool in TOOLS.values() if key in tool.names]
    names = {tool.names[key] for tool in tools}
    (name,) = names if len(names) == 1 else {key}
    if name not in _ours():
        return key, value
    spelt = [tool.values[name, value] for tool in tools if isinstance(value, str) and (name, value) in tool.values]
    return name, spelt[0] if spelt else value


def _without(key: str, name: str, value: Any) -> str:
    """Why a setting of another trainer has nothing to do here; empty where it has."""
    if name == "flash_attention" and key != name and value not in FLASH:
        return TOOLS["trl"].left["attn_implementation"]
    if value is None and name != key:
        return "what is there by itself fits"
    known = key in _ours() or key in _RENAMED or name != key
    return "" if known else next((tool.left[key] for tool in TOOLS.values() if key in tool.left), "")


def _present(name: str, value: Any) -> Any:
    """A setting's value by its present name, or each of several."""
    if isinstance(value, list):
        return [_present(name, item) for item in value]
    return _OLD_VALUES.get((name, value), value) if isinstance(value, str) else value


def _check_ratio(value: Any) -> None:
    """A ratio above 1 would be read as a number of steps under its present name."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        return  # said with the other settings
    if not 0 <= share <= 1:
        raise InputError(
            f"--warmup_ratio {share:g} makes no sense: it is a share from 0 to 1 (--warmup_steps counts steps)"
        )


def _fit_machine(settings: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What the machine cannot do is said and left out; fp16 on a CPU is an error, since nothing would stand for it."""
    _check_deepspeed(settings.get("deepspeed"))
    cuda = torch.cuda.is_available() and not _true(settings.get("use_cpu"))
    if not cuda and _true(settings.get("tf32")):
        del settings["tf32"]
        notes.append("--tf32 is left out: it is a mode of NVIDIA GPUs")
    if not cuda and _true(settings.get("fp16")):
        raise InputError("--fp16 needs a GPU; on a CPU use float32 (the default) or --bf16")
    if not cuda and _true(settings.get("bf16")):
        settings["use_cpu"] = True
        notes.append("--bf16 on a CPU without bf16 units is emulated and several times slower than float32")
    for name in ("fsdp", "deepspeed"):
        # Every launcher sets the first. One process on a GPU may want DeepSpeed or FSDP for what they move to the host.
        alone = "LOCAL_RANK" not in os.environ or (not cuda and os.environ.get("WORLD_SIZE") == "1")
        if settings.get(name) and alone:
            how = f"this is one process (torchrun -m rankalign train starts several, over which {name} shards)"
            notes.append(f"--{name} {settings.pop(name)} is left out: {how}")
            settings.pop("fsdp_config", None)
    return settings


def _check_deepspeed(told: Any) -> None:
    """Refuse a file that is not there or holds no settings, before a launch makes a traceback of it."""
    if not told or isinstance(told, dict):
        return
    try:
        content = loads(str(told)) if str(told).lstrip().startswith("{") else loads(read_text(str(told)))
    except ValueError as error:
        raise InputError(f"--deepspeed {told}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"--deepspeed {told}: expected a JSON object of DeepSpeed's settings")


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
