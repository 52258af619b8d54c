"""What makes a run the run that it is: every setting that can change a number, and the content of what it reads.

A run notes it in every checkpoint and in its manifest. Going on under other settings is refused, and so is "finished
already".
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rankalign.errors import InputError
from rankalign.storage.files import write_text
from rankalign.storage.journal import differences
from rankalign.storage.jsonl import dumps, loads
from rankalign.training.settings import GROUPS

NOTE = "run.json"

# The only settings that a run may change under way. All others, those of later transformers included, are its identity.
EXEMPT = frozenset({
    # Where things are, and what happens to an earlier run there; files that are read stand in it by their content.
    "output_dir", "overwrite", "resume", "resume_from_checkpoint", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "data", "eval_data", "push_to_hub", "hub_model_id",
    "hub_private_repo",
    # Where tokens are kept and who makes them; they are the same.
    "token_cache", "num_proc",
    # When the start model is asked; it says the same.
    "references",
    # What is told while it runs: the same updates, in coarser or finer lines.
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "skip_memory_metrics", "debug", "do_train",
    "do_eval", "do_predict",
    # How often a checkpoint is written; while the best one is sought it decides, see `_SEARCH`.
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model",
    "restore_callback_states_from_checkpoint",
    # Who fetches batches, and how processes talk; the batches stay the same.
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "local_rank",
    # The machine, which the manifest names, and what must have its only value.
    "use_cpu", "torch_empty_cache_steps", "remove_unused_columns", "length_column_name",
})  # fmt: skip
_SEARCH = ("save_strategy", "save_steps")
# Younger than runs that lie finished on disk: they count where they are set.
_YOUNG = {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_bema"}
_OWN = {item.name for group in GROUPS for item in dataclasses.fields(group)} - _YOUNG
# Noted under any value, so that a manifest tells the optimiser's settings whole; the others where they are not default.
_ALWAYS = {
    "num_train_epochs", "max_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "seed", "data_seed", "bf16", "fp16", "tf32", "train_sampling_strategy",
    "load_best_model_at_end", "metric_for_best_model",
}  # fmt: skip


def identity(config: TrainingArguments) -> dict[str, Any]:
    """Every setting that can change a number, as plain values.

    Args:
        config: the settings, resolved.
    """
    searched = _SEARCH if config.load_best_model_at_end else ()
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if item.name in EXEMPT and item.name not in searched:
            continue
        value = _plain(item.name, getattr(config, item.name))
        default = None if item.default is dataclasses.MISSING else getattr(item.default, "value", item.default)
        # Parsers hand a truth value that nobody gave on as None or as False.
        unset = value in (default, None, [], {}, "") or (default is None and value is False)
        if item.name in _OWN | _ALWAYS or not unset:
            found[item.name] = value
    if config.eval_strategy == "no":  # set to logging_steps where nothing is measured
        found.pop("eval_steps", None)
    if config.world_size > 1:
        found["processes"] = config.world_size  # an update takes so many micro-batches
    return found


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it; what stands in a file or an object by its content."""
    if name == "deepspeed" and isinstance(value, str):
        return loads(Path(value).read_text(encoding="utf-8"))
    if name == "accelerator_config":
        told, usual = value.to_dict(), type(value)().to_dict()
        return {key: told[key] for key in told if told[key] != usual[key]}
    if isinstance(value, list | tuple):
        return [getattr(item, "value", item) for item in value]
    return getattr(value, "value", value)


def note(folder: Path, settings: dict[str, Any], whole: bool = True) -> None:
    """Leave in a checkpoint what run it belongs to.

    Args:
        folder: the checkpoint's, made if need be.
        settings: the run's identity, with the hashes of what it reads.
        whole: False for one without the optimiser's state, from which nothing can go on.
    """
    write_text(folder / NOTE, dumps({"settings": settings, "resumable": whole}) + "\n")


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        folder: the checkpoint.
        settings: identity of the run that would go on.

    Raises:
        InputError: it was made under other settings or from other data, holds weights alone, or does not say.
    """
    way_out = "go on with those, name another --output_dir, or start over with --overwrite"
    path = folder / NOTE
    if not path.is_file():
        raise InputError(f"{folder} does not say which run it belongs to ({NOTE} is missing); {way_out}")
    told = loads(path.read_text(encoding="utf-8"))
    if changed := differences(told["settings"], loads(dumps(settings))):
        raise InputError(f"{folder} was made with other settings ({'; '.join(changed[:8])}); {way_out}")
    if not told["resumable"]:
        raise InputError(
            f"{folder} was saved with --save_only_model: it has no optimiser to go on with; "
            "name another --output_dir, or start over with --overwrite"
        )
