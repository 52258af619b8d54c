"""What each of transformers' own flags does here: it works, or it is refused at the start, with the reason.

``docs/training-flags.md`` is written from these tables; a test walks all fields that the installed transformers has.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from rankalign.errors import InputError
from rankalign.registry import did_you_mean

_OWN_EVALUATION = "held-out lists are measured by rankalign's own loop, which has no such step"
_NO_FORWARD = "rows do not pass through the model's own forward and loss, which it would change"
_HUB = "the finished folder is pushed once, at the end (--push_to_hub), or by `rankalign push`"

# Refused under any value but the default.
REFUSED: dict[str, str] = {
    "label_smoothing_factor": "it smooths token labels; losses that can be smoothed take --label_smoothing",
    "use_liger_kernel": _NO_FORWARD,
    "liger_kernel_config": _NO_FORWARD,
    "use_cache": "training rows have no cache of keys and values",
    "auto_find_batch_size": "--token_budget bounds what runs at once, with the same result",
    "optim_target_modules": "the optimisers that read it hook into the plain forward, which rows do not pass",
    "average_tokens_across_devices": "the mean is over the prompts of an update, on all devices alike",
    "bf16_full_eval": "measurements run in the numerics of training, see --bf16",
    "fp16_full_eval": "measurements run in the numerics of training, see --fp16",
    "include_num_input_tokens_seen": "every line of log.jsonl has the tokens since the last",
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "label_names": _OWN_EVALUATION,
    "do_predict": "there is no such step; `rankalign sample` answers prompts with the trained model",
    "length_column_name": "lists are not sorted by length: their rows are not padded",
    "remove_unused_columns": "batches are token lists and have no columns",
    "logging_nan_inf_filter": "a loss that is not finite is an error that names its prompts, not a gap in the log",
    "ignore_data_skip": "a resumed run goes on with the batches that it has not seen",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM write a checkpoint in any case",
    "debug": "a loss that is not finite names its prompts",
    "parallelism_config": "several processes are DDP, FSDP2 or DeepSpeed",
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
# Refused under some values, by checks below and in `rankalign.training.arguments`.
LIMITED: dict[str, str] = {
    "train_sampling_strategy": "random or sequential; not group_by_length, as rows are not padded",
    "accelerator_config": "split_batches, dispatch_batches and even_batches stay as they are",
    "report_to": "what is installed",
    "optim": "whose package is installed",
    "optim_args": "what the optimiser reads",
    "metric_for_best_model": "a figure that a measurement gives",
    "save_strategy": "best needs --metric_for_best_model and measurements",
    "do_eval": "with --eval_strategy, which says when",
    "fp16": "on a GPU",
    "torch_compile": "every layer's MLP, one graph for rows of all lengths; one process or DDP, not in 4 or 8 bits",
    "torch_compile_mode": "not those that record CUDA graphs, which are of one length",
    "tf32": "on an NVIDIA GPU; elsewhere left out, which is said",
    "fsdp": "under a launcher; for one process left out, which is said",
    "fsdp_config": "under a launcher; for one process left out, which is said",
    "ddp_backend": "under a launcher",
    "deepspeed": "a file of JSON, under a launcher; for one process left out, which is said",
    "resume_from_checkpoint": "a checkpoint of this very run; without it the newest is taken",
    "save_only_model": "such a checkpoint cannot be resumed from, which is said",
    "push_to_hub": "at the end, once: weights, tokenizer, configuration and card, and nothing else",
    "hub_model_id": "with --push_to_hub; by itself the name of output_dir",
    "hub_private_repo": "with --push_to_hub",
    "warmup_steps": "a run of one update has none, which is said",
}

# PPO's loop measures nothing beside its rollouts, and fetches no batches of a file.
PPO_UNREAD = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "neftune_noise_alpha", "save_only_model",
    "save_strategy", "data_seed", "report_to", "train_sampling_strategy", "full_determinism",
    "resume_from_checkpoint", "torch_empty_cache_steps", "restore_callback_states_from_checkpoint",
    "dataloader_num_workers", "dataloader_drop_last", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "skip_memory_metrics", "torch_compile",
    "torch_compile_backend", "torch_compile_mode",
)  # fmt: skip
_OFF: tuple[Any, ...] = (
    None,
    False,
    "no",
    "none",
    "",
    [],
)  # ways in which a parser may hand on a flag that nobody gave
_POSITIVE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "token_budget",
    "lora_r", "lora_alpha", "save_total_limit", "torch_empty_cache_steps", "logging_steps", "save_steps", "eval_steps",
    "adam_epsilon", "ddp_timeout",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "seed", "data_seed", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers",
    "eval_delay", "max_candidates", "early_stopping", "neftune_noise_alpha",
)  # fmt: skip
_SHARES = ("lora_dropout", "adam_beta1", "adam_beta2")  # below 1
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_POSITIVE, lambda value: value > 0, "above 0"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (_SHARES, lambda value: 0 <= value < 1, "from 0 to below 1"),
    (("seed", "data_seed"), lambda value: value < 1 << 32, "below 2^32"),  # numpy takes no larger one
    (("max_steps",), lambda value: value == -1 or value > 0, "above 0, or -1 for as many as the epochs take"),
    (("max_length",), lambda value: value >= 2, "at least 2: one token of a prompt and one of a response"),
)


def default_of(item: dataclasses.Field[Any]) -> Any:
    """A field's default as a plain value."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return getattr(item.default, "value", item.default)


def check_flags(config: Any) -> None:
    """Refuse what would do nothing or break later; to be called before ``TrainingArguments.__post_init__``.

    Raises:
        InputError: naming the flag and the reason.
    """
    defaults = {item.name: default_of(item) for item in dataclasses.fields(config)}
    for name, reason in REFUSED.items():
        if name in defaults and _given(config, name, defaults[name]):
            raise InputError(f"--{name} is not for training here: {reason}")
    for name in PPO_UNREAD if config.method == "ppo" else ():
        if _given(config, name, defaults[name]):
            raise InputError(f"--method ppo does not read --{name}")
    for names, fits, text in _RANGES:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise InputError(f"--{name} {value:g} makes no sense: it must be {text}")
    if config.max_steps <= 0 and not (math.isfinite(config.num_train_epochs) and config.num_train_epochs > 0):
        raise InputError(f"--num_train_epochs {config.num_train_epochs:g} makes no sense: it must be above 0")
    if config.train_sampling_strategy == "group_by_length":
        raise InputError("--train_sampling_strategy group_by_length: rows are not padded, so lengths need no sorting")
    if config.do_eval and config.eval_strategy == "no":
        raise InputError("--do_eval does nothing by itself: --eval_strategy steps|epoch says when (with --eval_data)")
    if config.ddp_backend and "LOCAL_RANK" not in os.environ:  # every launcher sets it
        raise InputError("--ddp_backend needs a launcher that starts several processes, such as torchrun")
    _check_reports(config.report_to)


def _given(config: Any, name: str, default: Any) -> bool:
    value = getattr(config, name)
    return bool(value != default) and not (value in _OFF and default in _OFF)


def _check_reports(asked: Any) -> None:
    there = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in asked if isinstance(asked, list) else [asked]:
        if name in (None, "none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"--report_to {name}: not known{did_you_mean(str(name), INTEGRATION_TO_CALLBACK)}")
        if name not in there:
            raise InputError(f"--report_to {name}: pip install {name} first; log.jsonl is kept in any case")


def check_optimiser(config: TrainingArguments) -> None:
    """Refuse an optimiser whose package is missing or whose options do not fit.

    Raises:
        InputError: with transformers' reason.
    """
    name = getattr(config.optim, "value", config.optim)
    if any(kind in name for kind in ("galore", "apollo", "lomo")):  # they hook into the layers of the plain forward
        raise InputError(f"--optim {name} is not for training here: {_NO_FORWARD}")
    if name == "stable_adamw" and "kahan_sum" in (config.optim_args or ""):  # transformers reads `False` as true
        raise InputError("--optim_args kahan_sum: it is on for weights of 16 bits, and off for wider ones, by itself")
    told = config.optim_args
    for part in told.replace(" ", "").split(",") if told else []:
        if not re.fullmatch(r"[^=]+=[^=]+", part):
            raise InputError(f"--optim_args {part!r}: write NAME=VALUE, with commas between several")
    given = _optimiser_options(config)
    parts = told.split(",") if told else []
    for part in parts:
        config.optim_args = ",".join(other for other in parts if other is not part)
        without = _optimiser_options(config)
        config.optim_args = told
        if without == given:
            raise InputError(f"--optim_args {part}: the optimiser {name} does not read it")
    _try_schedule(config)


def _optimiser_options(config: TrainingArguments) -> str:
    """The optimiser and its keywords, as text to compare."""
    try:
        return repr(Trainer.get_optimizer_cls_and_kwargs(config))
    except Exception as error:  # whatever a missing or a wrong package raises
        named = f"--optim {getattr(config.optim, 'value', config.optim)}"
        told = f" --optim_args {config.optim_args}" if config.optim_args else ""
        raise InputError(f"{named}{told}: {error}") from None


def _try_schedule(config: TrainingArguments) -> None:
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    told: Any = config.lr_scheduler_kwargs
    try:
        get_scheduler(config.lr_scheduler_type, probe, 1, 10, scheduler_specific_kwargs=told)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {getattr(config.lr_scheduler_type, 'value', config.lr_scheduler_type)}: {error}"
        ) from None
