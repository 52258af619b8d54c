"""What a training run starts from: data as token lists, a model, a layout for its rows, a reference."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.losses import Loss
from rankalign.models import adapters
from rankalign.models import load as models
from rankalign.models.identity import config_of, tokenizer_hash
from rankalign.models.sharded import is_spread
from rankalign.rows import flash_varlen, head_liger, logps, rewards
from rankalign.storage.jsonl import dumps
from rankalign.storage.sources import is_there, sha256_of
from rankalign.training import processes
from rankalign.training.ahead import References, StartModel
from rankalign.training.measures import BY_PAIRS
from rankalign.training.moving import MovingReference
from rankalign.training.reference import ReferenceCache
from rankalign.training.reward import freeze_lower
from rankalign.training.reward import load as load_reward
from rankalign.training.settings import DataSettings, LossSettings, ModelSettings, RunSettings
from rankalign.training.tokens import encode

BLOCK = 4096  # lists that are in memory at a time while all references are computed
CUT_TOO_OFTEN = 0.05  # share of texts cut, from which on the data is not what its author meant

# --- data --------------------------------------------------------------------------------------------------------


def data_hashes(settings: DataSettings) -> list[str]:
    """SHA-256 of each file that a run reads.

    Raises:
        InputError: none is named, or one is not there.
    """
    if not settings.data:
        raise InputError("--data is missing: a file of scored candidates (run `rankalign score` to make one)")
    for path in settings.paths:
        if not is_there(path):
            raise InputError(f"{path}: no such file")
    return [sha256_of(path) for path in settings.paths]


def start_hash(settings: ModelSettings, method: str = "rank") -> str:
    """What the start model's weights are: their hash, or the hub id.

    Raises:
        InputError: an adapter that nothing asks to train on.
    """
    if models.is_adapter(settings.model) and not settings.use_lora and method in ("rank", "sft"):
        raise InputError(
            f"model {settings.model} is an adapter: --use_lora trains it on, `rankalign merge` folds it into its base"
        )
    return models.weights_of(settings.model)


def read_hashes(of_data: DataSettings, of_model: ModelSettings, method: str) -> dict[str, Any]:
    """Content of all that a run reads, the part of its identity that no setting names.

    Raises:
        InputError: something is not there, or an adapter that nothing asks to train on.
    """
    return {
        "data_sha256": data_hashes(of_data),
        "model_sha256": start_hash(of_model, method),
        "model_config_sha256": config_of(of_model.model),
        "tokenizer_sha256": tokenizer_hash(of_model.model),
    }


def say_counts(counts: Mapping[str, int]) -> None:
    """Say on stderr what was read, and warn where the limit of length cuts more than a few texts: cut answers are
    learned without their end.

    Args:
        counts: of :func:`rankalign.training.tokens.encode`.
    """
    print("data: " + ", ".join(f"{value} {name}" for name, value in counts.items() if value), file=sys.stderr)
    for name, whole in (("response", "candidates"), ("prompt", "prompts")):
        cut, all_of_them = counts.get(f"{name}_truncated", 0), max(counts.get(whole, 0), 1)
        if cut / all_of_them >= CUT_TOO_OFTEN:
            print(f"warning: {cut} {name}s, {cut / all_of_them:.0%}, are cut at --max_length", file=sys.stderr)


def load_data(
    settings: DataSettings, loss: LossSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[TokenList], Sequence[TokenList], dict[str, int]]:
    """Training lists, held-out lists and counts; everything left out is counted and said on stderr.

    Raises:
        InputError: nothing is left that the loss can learn from.
    """
    alone = loss.loss == "sft"
    lists, counts = encode(settings, tokenizer, settings.data, alone, loss.grades)
    if loss.entry.needs_pairs(loss.keywords()) and not counts.get("pairs"):
        raise InputError(_nothing_to_rank(settings, loss))
    check_own(loss.entry, loss.loss, counts, settings.data)
    if not lists:
        raise InputError(f"{settings.data}: no usable prompt ({counts})")
    held_out: Sequence[TokenList] = []
    if settings.eval_data:
        held_out = encode(settings, tokenizer, settings.eval_data, alone, loss.grades)[0]
    say_counts(counts)
    return lists, held_out, counts


def check_own(loss: Loss, name: str, counts: Mapping[str, int], path: str) -> None:
    """Refuse data that does not say which answers the model wrote, for a loss that asks.

    Raises:
        InputError: no answer is marked.
    """
    if loss.needs_own and not counts.get("own_answers"):
        raise InputError(
            f"{path}: loss {name!r} needs to know which answers the model itself wrote, and none is marked so; "
            "`rankalign iterate` marks them"
        )


def check_held_out(held_out: Sequence[TokenList], measured: bool, metric: str | None) -> None:
    """Refuse measurements while training that have nothing to measure.

    Args:
        held_out: the lists of ``--eval_data``.
        measured: whether the run measures at all.
        metric: what picks the best checkpoint.
    """
    if (metric or "").removeprefix("eval_") in BY_PAIRS and not any(len(set(tokens.scores)) > 1 for tokens in held_out):
        raise InputError(f"the best checkpoint by {metric} needs --eval_data in which responses differ in score")
    if measured and not held_out:
        raise InputError("--eval_strategy needs --eval_data")


def _nothing_to_rank(settings: DataSettings, loss: LossSettings) -> str:
    """The message, with the way on for single answers that have a thumb up or down."""
    told = f"{settings.data}: no two responses of a prompt differ in score, so there is nothing to rank"
    if settings.max_candidates == 1:
        return f"{told}: --max_candidates 1 leaves one response of each"
    if loss.grades:
        return told
    rival = loss.loss if "threshold" in loss.entry.defaults else "kto"
    thumbs = f"--loss {rival} --loss_options '{{\"threshold\": 0.5}}'"
    return f"{told}; {thumbs} learns from scores on single answers, --method sft from the answers alone"


# --- model -------------------------------------------------------------------------------------------------------


def load_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    reward: bool = False,
    dtype: str = "float32",
    axes: Sequence[str] = (),
) -> Any:
    """The model (its products in bf16 and fp16 come by autocast), its dropout off, with a fresh adapter where asked.

    Args:
        settings: what is trained.
        tokenizer: the model's; a reward model may change what it pads with.
        reward: with a head that grades, in the place of the one that writes.
        dtype: of its weights; those of adapters and of a head that grades are float32.
        axes: what the outputs of a head that grades are called, where it has several.
    """
    name = settings.model
    more: dict[str, Any] = {"bits": settings.quantised, "train_adapter": settings.use_lora}
    model: Any = (
        load_reward(name, tokenizer, settings.pooling, dtype, axes)
        if reward
        else models.load_policy(name, dtype=dtype, **more)
    )
    return as_trained(settings, model, dtype)


def as_trained(settings: ModelSettings, model: Any, dtype: str = "float32") -> Any:
    """A start model made ready: its dropout off, with an adapter or frozen layers where asked for."""
    if dtype == "bfloat16" and not settings.use_lora:
        print("--dtype bfloat16: updates below a 256th of a weight are rounded away, in part or whole", file=sys.stderr)
    if settings.disable_dropout:
        disable_dropout(model)
    if settings.use_lora:
        model = _adapted(settings, model)
    if settings.freeze_layers:
        freeze_lower(model, settings.freeze_layers)
    return model


def _adapted(settings: ModelSettings, model: Any) -> Any:
    """The model with an adapter that trains: the one it came with, or a fresh one."""
    if models.is_adapter(settings.model):
        print(f"LoRA: training the adapter {settings.model} on, with its own rank and scale", file=sys.stderr)
        return adapters.say_trainable(model)
    rank, scale, dropout = settings.lora_r, settings.lora_alpha, settings.lora_dropout
    what = settings.lora_targets, settings.use_dora, settings.lora_parameters
    return adapters.add_lora(model, rank, scale, dropout, *what)


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout, those that attention reads from a number included, to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def choose_kernels(settings: RunSettings) -> None:
    """What runs on a GPU, from now on and in the whole process.

    Raises:
        InputError: what was asked for is not installed, or not for this device.
    """
    on_gpu = models.device().type == "cuda"
    flash_varlen.choose_flash(settings.flash_attention, on_gpu)
    head_liger.choose(settings.head, on_gpu)


def choose_layout(
    asked: str,
    model: Any,
    lists: Sequence[TokenList],
    batch: int = 8,
    reward: bool = False,
    precision: str = "float32",
) -> tuple[str, str]:
    """How rows are laid out, and why; with ``auto``, decided by comparing both ways on the first lists of this run.

    Args:
        asked: ``tree``, ``padded`` or ``auto``.
        model: what will train.
        lists: all of them.
        batch: lists of a micro-batch; so many are compared, and eight at most.
        reward: whether the model grades.
        precision: ``float32``, ``bf16`` or ``fp16``, as training runs the model: each has kernels of its own.
    """
    first = lists[: min(batch, 8)]
    # Whatever dropout is left would make the two ways differ by chance.
    model.eval()
    choose = rewards.choose_layout if reward else logps.choose_layout
    with mixed(precision):
        chosen = choose(model, [t.prompt for t in first], [t.responses for t in first])  # also compares the model's own
    return chosen if asked == "auto" else (asked, "as asked")


def mixed(precision: str) -> torch.autocast:
    """Mixed precision as training runs it, of ``bf16`` or ``fp16``; none for ``float32``."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(models.device().type, dtype=kind, enabled=precision != "float32")


def reference_cache(settings: ModelSettings, loss: LossSettings, precision: str, model: Any) -> ReferenceCache:
    """Where log-probabilities under the start model are kept.

    Args:
        settings: names the start model, by whose weights and settings they are kept.
        loss: whose method trains.
        precision: ``float32``, ``bf16`` or ``fp16``, as training runs the model.
        model: the start model.
    """
    told = [start_hash(settings, loss.method), config_of(settings.model)]
    make = hashlib.sha256(dumps(told).encode()).hexdigest()
    numerics = f"{precision}-{models.device().type}" + (f"-{settings.quantised}bit" if settings.quantised else "")
    numerics += "-bfloat16" if next(model.parameters()).dtype == torch.bfloat16 else ""
    tokens = loss.entry.needs_tokens
    return ReferenceCache(models.cache_dir() / "reference", make, numerics, tokens=tokens)


def references_of(
    settings: ModelSettings,
    loss: LossSettings,
    precision: str,
    model: Any,
    layout: str,
    lists: Sequence[TokenList],
    budget: int = 0,
) -> list[Tensor] | list[None]:
    """Log-probabilities of each list under the start model, from the cache where they are known.

    They go by place and never by id: a training and a held-out file may well use the same ids. Each process computes
    its share and has all of them in the end.

    Args:
        settings: as in :func:`reference_cache`.
        loss: says whether a reference is needed; where none is, nothing is computed and each list has None.
        precision: as in :func:`reference_cache`.
        model: the start model.
        layout: of its rows.
        lists: whose responses.
        budget: as in :func:`start_logps`.
    """
    if not loss.entry.needs_reference:
        return [None] * len(lists)
    cache, rows = reference_cache(settings, loss, precision, model), list[Tensor]()
    tokens = loss.entry.needs_tokens

    def compute(some: Sequence[TokenList]) -> list[Tensor]:
        return start_logps(precision, model, layout, some, budget, tokens=tokens)

    def together(some: Sequence[TokenList]) -> list[Tensor]:
        return _together_logps(precision, model, layout, some, budget, tokens)

    for start in range(0, len(lists), BLOCK):
        block = lists[start : start + BLOCK]
        if is_spread(model):
            rows += _led(cache, block, together)
            continue
        rows += processes.together(cache.logps(processes.share(block), compute))
    print(cache.said(), file=sys.stderr)
    return rows


def references_ahead(config: Any, model: Any, layout: str) -> References | None:
    """What computes the reference of each update just before it; None where no loss needs it, or it is better done
    before the first one, by :func:`references_of`.

    Args:
        config: a :class:`rankalign.training.arguments.TrainConfig`.
        model: the start model.
        layout: of its rows.
    """
    of_model, precision, budget = config.model_settings, config.precision, config.token_budget
    start = StartModel(of_model, config.weights_dtype)
    sharded = processes.asked_to_shard(config)
    if config.sync_ref_model:
        return _moving(config, layout)
    if config.references == "ahead" and sharded:
        raise InputError("--references ahead needs whole weights, and here they are sharded: leave it out")
    late = config.references == "before" or sharded
    if config.references == "auto" and not start.below_adapter:
        late = late or not fits_again(model)
    if late or not config.loss_entry.needs_reference:
        return None
    cache = reference_cache(of_model, config.loss_settings, precision, model)
    tokens = config.loss_entry.needs_tokens
    return References(cache, start, lambda of, some: start_logps(precision, of, layout, some, budget, tokens=tokens))


def _moving(config: Any, layout: str) -> References:
    """References of a reference that moves, which no cache may answer for."""
    precision, tokens = config.precision, config.loss_entry.needs_tokens
    moving, budget = MovingReference(config.loss_settings), config.token_budget
    return References(None, moving, lambda of, some: start_logps(precision, of, layout, some, budget, tokens=tokens))


def fits_again(model: nn.Module, room: int = 0) -> bool:
    """Whether a card has room for the weights, their gradients, AdamW's two states, and the weights again, with a sixth
    of it left to the rows. A CPU's memory can be given back and is not asked.

    Args:
        model: may lie on the meta device.
        room: bytes of a card that need not be here; 0 for this machine's device.
    """
    if not room:
        if models.device().type != "cuda":
            return True
        room = int(torch.cuda.get_device_properties(models.device()).total_memory)
    return 6 * sum(weight.numel() * weight.element_size() for weight in model.parameters()) <= room


def _led(
    cache: ReferenceCache, lists: Sequence[TokenList], compute: Callable[[Sequence[TokenList]], list[Tensor]]
) -> list[Tensor]:
    """What the cache gives these lists, where the weights are spread: the first process asks it, and tells the others
    whenever the model is to run, which takes all of them."""
    rows: list[Tensor] = []
    if not PartialState().is_main_process:
        while (some := broadcast_object_list([None])[0]) is not None:
            compute(some)
        return list(broadcast_object_list([rows])[0])

    def told(some: Sequence[TokenList]) -> list[Tensor]:
        broadcast_object_list([list(some)])
        return compute(some)

    try:
        rows = cache.logps(lists, told)
    finally:
        broadcast_object_list([None])
    return list(broadcast_object_list([rows])[0])


def _together_logps(
    precision: str, model: Any, layout: str, lists: Sequence[TokenList], budget: int, tokens: bool
) -> list[Tensor]:
    """Each process computes its share and has all of them in the end."""
    own = processes.share(lists)
    return processes.together(start_logps(precision, model, layout, own, budget, lists[:1], tokens))


@torch.no_grad()
def start_logps(
    precision: str,
    model: Any,
    layout: str,
    lists: Sequence[TokenList],
    budget: int = 0,
    spare: Sequence[TokenList] = (),
    tokens: bool = False,
) -> list[Tensor]:
    """(N,) log-probabilities of each list under a model that is not trained yet, in the numerics of training.

    Args:
        precision: ``float32``, ``bf16`` or ``fp16``.
        model: the start model.
        layout: of its rows.
        lists: whose responses.
        budget: tokens that run at once on a GPU. On a CPU a list runs by itself: nothing is gained by more, and its
            bits do not depend on what stands beside it.
        spare: what to run once more, for nothing, until the process with the most to run is done: where the weights are
            spread over processes, all must run alike.
        tokens: give (N, T) of the counted tokens instead, with 0 behind those of a shorter response.
    """
    model.eval()  # a fresh adapter adds exactly zero, so the adapted model is the reference still
    rows: list[Tensor] = []
    with mixed(precision):
        groups = _together(lists, budget if models.device().type == "cuda" else 0)
        idle = [spare] * (max(gather_object([len(groups)])) - len(groups)) if spare else []
        for some in [*groups, *idle]:
            ids = [t.prompt for t in some], [t.responses for t in some]
            more: dict[str, Any] = {"unlearned": [t.unlearned for t in some], "tokens": tokens}
            found = logps.list_logps(model, *ids, layout=layout, **more).cpu()
            rows += [row[: len(t.responses)] for row, t in zip(found, some, strict=True)]
    return rows[: len(lists)]


def _together(lists: Sequence[TokenList], budget: int) -> list[list[TokenList]]:
    """The lists, in order, in groups within the budget by what they take unpacked; one at least."""
    groups: list[list[TokenList]] = []
    left = 0
    for tokens in lists:
        size = len(tokens.responses) * (len(tokens.prompt) + max(map(len, tokens.responses), default=0))
        if size > left:
            groups, left = [*groups, []], budget
        groups[-1].append(tokens)
        left -= size
    return groups
