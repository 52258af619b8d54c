"""One training run: data, model, reference, trainer, and what is left on disk at the end."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from rankalign import data, logps, manifest, models, rewards
from rankalign.batching import EncodeOptions, TokenList, encode_all
from rankalign.convert import Intake
from rankalign.errors import InputError
from rankalign.files import sha256_file, write_text
from rankalign.records import CandidateSet, choose_judge, judges
from rankalign.training import processes
from rankalign.training.added_tokens import add_tokens
from rankalign.training.arguments import TrainConfig
from rankalign.training.diagnosis import Diagnosis
from rankalign.training.rank import Example, RankTrainer, Watch
from rankalign.training.reference import ReferenceCache
from rankalign.training.reward import RewardTrainer, freeze_lower, start_at_zero
from rankalign.training.reward import load as load_reward

UNSCORED = "only"  # judge of single responses that nobody scored, which SFT may still learn from


class Interrupted(Exception):
    """Training stopped early on Ctrl-C or SIGTERM, after a checkpoint."""


def train(config: TrainConfig, watch: Watch | None = None) -> dict[str, Any]:
    """Train as ``config`` says and leave model, ``log.jsonl`` and manifest in ``config.output_dir``.

    Args:
        config: settings.
        watch: measures the model at each evaluation, beside the held-out lists.

    Returns:
        ``{"output", "steps", "counts", "metrics", "seconds", "already_finished"}``.

    Raises:
        InputError: bad settings or data.
        Interrupted: stopped by a signal; the same call goes on from the checkpoint.
    """
    add_tokens(config)
    output = Path(str(config.output_dir))
    settings = {**config.own_settings(), "data_sha256": _data_hashes(config), "model_sha256": _start_hash(config)}
    if config.overwrite:
        with PartialState().main_process_first():
            shutil.rmtree(output, ignore_errors=True)
    elif manifest.is_finished(output, settings):
        print(f"{output} is finished already with these settings: nothing to do", file=sys.stderr)
        return {**_summary(output, manifest.read(output) or {}), "already_finished": True}
    started = time.time()
    set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model)
    lists, held_out, counts = _load_data(config, tokenizer)
    with processes.whole_weights(config):
        model = _load_model(config, tokenizer)
    layout, why = _layout(config, model, lists)
    print(f"layout: {layout} ({why})", file=sys.stderr)
    if config.method == "reward":
        start_at_zero(model)
    references = _references(config, model, layout, [*lists, *held_out])
    examples = [Example(tokens, references.get(tokens.id)) for tokens in lists]
    trainer = (RewardTrainer if config.method == "reward" else RankTrainer)(
        model,
        config,
        examples,
        [Example(tokens, references.get(tokens.id)) for tokens in held_out],
        layout,
        processing_class=tokenizer,
        callbacks=_callbacks(config, output),
    )
    processes.check_type(trainer.accelerator.distributed_type, config.fsdp, config.deepspeed)
    if trainer.is_deepspeed_enabled:
        processes.save_whole(trainer.accelerator.state.deepspeed_plugin)
    trainer.watch = watch
    _run(trainer, config)
    _save(trainer, tokenizer, output)
    facts = {"counts": counts, "metrics": trainer.state.log_history[-1], "seconds": time.time() - started}
    facts["steps"] = trainer.state.global_step
    if processes.is_first():
        _write_manifest(config, output, settings, facts)
    PartialState().wait_for_everyone()
    return {**_summary(output, facts), "already_finished": False}


def _write_manifest(config: TrainConfig, output: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    outputs = [p for p in sorted(output.iterdir()) if p.is_file() and p.suffix != ".bin" and p.name != "manifest.json"]
    manifest.write(output, "train", settings, _data_paths(config), outputs, **facts)


def _summary(output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    return {"output": str(output), **{key: facts[key] for key in ("steps", "counts", "metrics", "seconds")}}


# --- data --------------------------------------------------------------------------------------------------------


def _data_paths(config: TrainConfig) -> list[Any]:
    return [path for path in (config.data, config.eval_data) if path]


def _data_hashes(config: TrainConfig) -> list[str]:
    if not config.data:
        raise InputError("--data is missing: a file of scored candidates (run `rankalign score` to make one)")
    for path in _data_paths(config):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file")
    return [sha256_file(path) for path in _data_paths(config)]


def _start_hash(config: TrainConfig) -> str:
    where = models.resolve(config.model)
    if models.is_adapter(where) and not config.use_lora and config.method in ("rank", "sft"):
        raise InputError(
            f"model {config.model} is an adapter: --use_lora trains it on, or merge it into its base first"
        )
    return models.weights_fingerprint(where) if Path(where).is_dir() else where


def _load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenList], list[TokenList], dict[str, int]]:
    """Training lists, held-out lists and counts; everything left out is counted and said on stderr."""
    lists, counts = _encode(config, tokenizer, config.data)
    if (config.loss_entry.pairwise or config.method == "reward") and not counts.get("pairs"):
        raise InputError(f"{config.data}: no two responses of a prompt differ in score, so there is nothing to rank")
    if not lists:
        raise InputError(f"{config.data}: no usable prompt ({counts})")
    held_out, found = _encode(config, tokenizer, config.eval_data) if config.eval_data else ([], {})
    if config.metric_for_best_model and "accuracy" in config.metric_for_best_model and not found.get("pairs"):
        raise InputError("the best checkpoint by accuracy needs --eval_data in which responses differ in score")
    if config.eval_strategy != "no" and not held_out:
        raise InputError("--eval_strategy needs --eval_data")
    print("data: " + ", ".join(f"{value} {name}" for name, value in counts.items() if value), file=sys.stderr)
    return lists, held_out, counts


def _encode(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, path: str
) -> tuple[list[TokenList], dict[str, int]]:
    intake = Intake(config.skip_invalid)
    sets = list(data.load(path, config.format, intake))
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
    return lists, {**counts, **intake.losses.counts, "skipped_invalid": len(intake.errors)}


def _judge(config: TrainConfig, sets: Sequence[CandidateSet]) -> str:
    """The judge to rank by; SFT also takes unscored data, if each prompt has just one response."""
    single = all(len(record.responses) == 1 for record in sets)
    if config.loss == "sft" and not config.judge and single and not judges(sets):
        for record in sets:
            record.responses[0].scores[UNSCORED] = 0.0
        return UNSCORED
    return choose_judge(sets, config.judge)


# --- model -------------------------------------------------------------------------------------------------------


def _load_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
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
        return models.say_trainable(model)
    targets: Any = config.lora_target_modules
    targets = targets if targets == "auto" else targets.split(",")
    return models.add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, targets, config.use_dora)


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout, those that attention reads from a number included, to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _layout(config: TrainConfig, model: Any, lists: list[TokenList]) -> tuple[str, str]:
    """How rows are laid out; with ``auto``, decided by comparing both ways on the first lists of this very run."""
    if config.layout != "auto":
        return config.layout, "as asked"
    first = lists[: min(config.per_device_train_batch_size, 8)]
    model.eval()
    choose = rewards.choose_layout if config.method == "reward" else logps.choose_layout
    return choose(model, [t.prompt for t in first], [t.responses for t in first])


def _references(config: TrainConfig, model: Any, layout: str, lists: list[TokenList]) -> dict[str, Tensor]:
    """Log-probabilities under the start model by prompt id, from the cache where they are known."""
    if not config.loss_entry.needs_reference:
        return {}
    weights = _start_hash(config)
    numerics = f"{'bf16' if config.bf16 else 'fp16' if config.fp16 else 'float32'}-{models.device().type}"
    numerics += f"-{config.quantised}bit" if config.quantised else ""
    cache = ReferenceCache(models.cache_dir() / "reference", weights.replace("/", "--"), numerics)
    rows = cache.logps(lists, lambda some: _shared_logps(config, model, layout, some))
    print(f"reference: {cache.computed} responses computed, the rest from {cache.path}", file=sys.stderr)
    return {tokens.id: row for tokens, row in zip(lists, rows, strict=True)}


def _shared_logps(config: TrainConfig, model: Any, layout: str, lists: Sequence[TokenList]) -> list[Tensor]:
    """Each process computes its share and has all of them in the end."""
    state = PartialState()
    own = _start_logps(config, model, layout, lists[state.process_index :: state.num_processes])
    shares = gather_object([own])
    return [shares[i % state.num_processes][i // state.num_processes] for i in range(len(lists))]


@torch.no_grad()
def _start_logps(config: TrainConfig, model: Any, layout: str, lists: Sequence[TokenList]) -> list[Tensor]:
    model.eval()  # a fresh adapter adds exactly zero, so the adapted model is the reference still
    kind = torch.bfloat16 if config.bf16 else torch.float16
    rows = []
    with torch.autocast(models.device().type, dtype=kind, enabled=config.bf16 or config.fp16):
        for tokens in lists:
            sums = logps.list_logps(model, [tokens.prompt], [tokens.responses], layout=layout)
            rows.append(sums[0].cpu())
    return rows


# --- the run -----------------------------------------------------------------------------------------------------


class JsonlLog(TrainerCallback):
    """Keeps ``log.jsonl`` equal to the trainer's history, also after a resume from an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Rewrite the file, whole and atomically, and show the line where no progress bar does."""
        if not state.is_world_process_zero:
            return
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in state.log_history))
        if args.disable_tqdm:
            line = state.log_history[-1]
            shown = " ".join(f"{key}={value:.4g}" for key, value in line.items() if isinstance(value, int | float))
            print(f"step {state.global_step}/{state.max_steps}: {shown}", file=sys.stderr, flush=True)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the update, write a checkpoint, stop. The same signal again stops at once.

    Launchers answer Ctrl-C, which reaches all processes by itself, with SIGTERM to each of them: that is no second.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._seen: set[int] = set()
        self._old = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}

    def _catch(self, number: int, frame: Any) -> None:
        self.caught += 1
        if number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        print("stopping after this update (again to stop at once)", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for a checkpoint and the end once a signal came, to whichever process."""
        if args.world_size > 1:
            self.caught = int(reduce(torch.tensor(self.caught, device=args.device), "sum"))
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Launch(TrainerCallback):
    """Says on how many processes and in what wrapper a model trains, once it is wrapped."""

    def __init__(self, trainer: RankTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One line, and none for a single process."""
        if args.world_size > 1:
            kind = self.trainer.accelerator.distributed_type
            print(processes.describe(kind, self.trainer.model_wrapped), file=sys.stderr, flush=True)


def _callbacks(config: TrainConfig, output: Path) -> list[TrainerCallback]:
    stop = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else []
    return [Diagnosis(), JsonlLog(output / "log.jsonl"), *stop]


def _run(trainer: RankTrainer, config: TrainConfig) -> None:
    output = Path(str(config.output_dir))
    last = last_checkpoint(output)
    if last and not config.resume:
        raise InputError(
            f"{output} holds {Path(last).name} of an earlier run; resume it or start over with --overwrite"
        )
    if last:
        print(f"resuming from {last}", file=sys.stderr)
    if config.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.add_callback(Launch(trainer))
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        stop.restore()
    if stop.caught and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; the same command goes on from its checkpoint")


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint of a run; one that a kill left half written, without its last file, does not count."""
    whole = [p.parent for p in output.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    return str(max(whole, key=lambda p: int(p.name[11:]))) if whole else None


def _save(trainer: RankTrainer, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """The final weights and tokenizer, loadable by transformers (or peft) without us."""
    trainer.save_model(str(output))
    if processes.is_first():
        tokenizer.save_pretrained(str(output))
