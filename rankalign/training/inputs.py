"""What a training run starts from: data as token lists, a model, a layout for its rows, a reference."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankalign.data import load as data
from rankalign.data.convert import Intake
from rankalign.data.encode import EncodeOptions, TokenList, encode_all
from rankalign.data.formats import Losses
from rankalign.data.records import CandidateSet, choose_judge, judges
from rankalign.errors import InputError
from rankalign.models import adapters
from rankalign.models import load as models
from rankalign.rows import logps, rewards
from rankalign.storage.sources import is_there, sha256_of
from rankalign.training.arguments import TrainConfig
from rankalign.training.reference import ReferenceCache
from rankalign.training.reward import freeze_lower
from rankalign.training.reward import load as load_reward

UNWANTED = "label"  # judge that says whether people wanted an answer
UNSCORED = "only"  # judge of single responses that nobody scored, which SFT may still learn from

# --- data --------------------------------------------------------------------------------------------------------


def data_paths(config: TrainConfig) -> list[Any]:
    """The files that a run reads."""
    return [path for path in (config.data, config.eval_data) if path]


def data_hashes(config: TrainConfig) -> list[str]:
    """SHA-256 of each.

    Raises:
        InputError: none is named, or one is not there.
    """
    if not config.data:
        raise InputError("--data is missing: a file of scored candidates (run `rankalign score` to make one)")
    for path in data_paths(config):
        if not is_there(path):
            raise InputError(f"{path}: no such file")
    return [sha256_of(path) for path in data_paths(config)]


def start_hash(config: TrainConfig) -> str:
    """What the start model's weights are: their hash, or the hub id.

    Raises:
        InputError: an adapter that nothing asks to train on.
    """
    if models.is_adapter(config.model) and not config.use_lora and config.method in ("rank", "sft"):
        raise InputError(
            f"model {config.model} is an adapter: --use_lora trains it on, `rankalign merge` folds it into its base"
        )
    return models.weights_of(config.model)


def load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenList], list[TokenList], dict[str, int]]:
    """Training lists, held-out lists and counts; everything left out is counted and said on stderr."""
    lists, counts = encode(config, tokenizer, config.data)
    if (config.loss_entry.pairwise or config.method == "reward") and not counts.get("pairs"):
        raise InputError(f"{config.data}: no two responses of a prompt differ in score, so there is nothing to rank")
    if not lists:
        raise InputError(f"{config.data}: no usable prompt ({counts})")
    held_out, found = encode(config, tokenizer, config.eval_data) if config.eval_data else ([], {})
    if config.metric_for_best_model and "accuracy" in config.metric_for_best_model and not found.get("pairs"):
        raise InputError("the best checkpoint by accuracy needs --eval_data in which responses differ in score")
    if config.eval_strategy != "no" and not held_out:
        raise InputError("--eval_strategy needs --eval_data")
    print("data: " + ", ".join(f"{value} {name}" for name, value in counts.items() if value), file=sys.stderr)
    return lists, held_out, counts


def encode(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, path: str
) -> tuple[list[TokenList], dict[str, int]]:
    """The lists of one file, and counts of all that was kept, cut and left out."""
    intake = Intake(config.skip_invalid, config.ignore_columns)
    sets = list(data.load(path, config.format, intake))
    if config.loss == "sft" and config.judge in ("", UNWANTED):
        without_unwanted(sets, intake.losses)
    options = EncodeOptions(
        judge=_judge(config, sets),
        template=config.template,
        system=config.system,
        max_length=config.max_length,
        max_candidates=config.max_candidates,
        only_use_provide=config.only_use_provide,
        only_use_sample=config.only_use_sample,
        stop_response=config.stop_response,
    )
    lists, counts = encode_all(sets, tokenizer, options)
    unread = {f"rows with the unread column {column}": count for column, count in intake.unread.counts.items()}
    renamed = {"renamed ids": intake.renamed} if intake.renamed else {}
    return lists, {**counts, **intake.losses.counts, **unread, **renamed, "skipped_invalid": len(intake.errors)}


def without_unwanted(sets: list[CandidateSet], losses: Losses) -> None:
    """Take out of lists for supervised training every answer that people labelled as unwanted, and count them."""
    for record in sets:
        wanted = [response for response in record.responses if response.scores.get(UNWANTED) != 0]
        if left := len(record.responses) - len(wanted):
            losses.add("answers labelled as unwanted, which are not imitated", left)
            record.responses = wanted
    sets[:] = [record for record in sets if record.responses]


def _judge(config: TrainConfig, sets: Sequence[CandidateSet]) -> str:
    """The judge to rank by; SFT also takes unscored data, if each prompt has just one response."""
    single = all(len(record.responses) == 1 for record in sets)
    if config.loss == "sft" and not config.judge and single and not judges(sets):
        for record in sets:
            record.responses[0].scores[UNSCORED] = 0.0
        return UNSCORED
    return choose_judge(sets, config.judge)


# --- model -------------------------------------------------------------------------------------------------------


def load_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model in float32 (bf16 and fp16 come by autocast), its dropout off, with a fresh adapter where asked."""
    reward = config.method == "reward"
    more: dict[str, Any] = {"bits": config.quantised, "train_adapter": config.use_lora}
    model: Any = (
        load_reward(config.model, tokenizer) if reward else models.load_policy(config.model, dtype="float32", **more)
    )
    if config.disable_dropout:
        disable_dropout(model)
    if config.use_lora:
        model = _adapted(config, model)
    if config.freeze_layers:
        freeze_lower(model, config.freeze_layers)
    return model


def _adapted(config: TrainConfig, model: Any) -> Any:
    """The model with an adapter that trains: the one it came with, or a fresh one."""
    if models.is_adapter(config.model):
        print(f"LoRA: training the adapter {config.model} on, with its own rank and scale", file=sys.stderr)
        return adapters.say_trainable(model)
    targets = config.lora_targets
    return adapters.add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, targets, config.use_dora)


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout, those that attention reads from a number included, to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def choose_layout(config: TrainConfig, model: Any, lists: list[TokenList]) -> tuple[str, str]:
    """How rows are laid out; with ``auto``, decided by comparing both ways on the first lists of this very run."""
    if config.layout != "auto":
        return config.layout, "as asked"
    first = lists[: min(config.per_device_train_batch_size, 8)]
    model.eval()
    choose = rewards.choose_layout if config.method == "reward" else logps.choose_layout
    return choose(model, [t.prompt for t in first], [t.responses for t in first])


def references_of(config: TrainConfig, model: Any, layout: str, lists: list[TokenList]) -> dict[str, Tensor]:
    """Log-probabilities under the start model by prompt id, from the cache where they are known."""
    if not config.loss_entry.needs_reference:
        return {}
    weights = start_hash(config)
    numerics = f"{'bf16' if config.bf16 else 'fp16' if config.fp16 else 'float32'}-{models.device().type}"
    numerics += f"-{config.quantised}bit" if config.quantised else ""
    cache = ReferenceCache(models.cache_dir() / "reference", weights.replace("/", "--"), numerics)
    rows = cache.logps(lists, lambda some: _shared_logps(config, model, layout, some))
    print(f"reference: {cache.computed} responses computed, the rest from {cache.path}", file=sys.stderr)
    return {tokens.id: row for tokens, row in zip(lists, rows, strict=True)}


def _shared_logps(config: TrainConfig, model: Any, layout: str, lists: Sequence[TokenList]) -> list[Tensor]:
    """Each process computes its share and has all of them in the end."""
    state = PartialState()
    own = start_logps(config, model, layout, lists[state.process_index :: state.num_processes])
    shares = gather_object([own])
    return [shares[i % state.num_processes][i // state.num_processes] for i in range(len(lists))]


@torch.no_grad()
def start_logps(config: TrainConfig, model: Any, layout: str, lists: Sequence[TokenList]) -> list[Tensor]:
    """(N,) log-probabilities of each list under a model that is not trained yet, in the numerics of training."""
    model.eval()  # a fresh adapter adds exactly zero, so the adapted model is the reference still
    kind = torch.bfloat16 if config.bf16 else torch.float16
    rows = []
    with torch.autocast(models.device().type, dtype=kind, enabled=config.bf16 or config.fp16):
        for tokens in lists:
            sums = logps.list_logps(model, [tokens.prompt], [tokens.responses], layout=layout)
            rows.append(sums[0].cpu())
    return rows
