"""One training run: data, model, reference, trainer, and what is left on disk at the end."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from rankalign.data.token_table import Joined
from rankalign.errors import InputError, Interrupted
from rankalign.models import load as models
from rankalign.models import saving, sharded
from rankalign.storage import manifest, outputs
from rankalign.storage.files import write_text
from rankalign.storage.folders import check_writable
from rankalign.storage.jsonl import dumps, without_nan
from rankalign.training import heap, processes, spread
from rankalign.training.added_tokens import add_tokens
from rankalign.training.arguments import TrainConfig
from rankalign.training.card import write_card
from rankalign.training.dashboards import without
from rankalign.training.defaults import say
from rankalign.training.diagnosis import Diagnosis
from rankalign.training.examples import Examples
from rankalign.training.fit import check_fit
from rankalign.training.identity import check_same_run
from rankalign.training.inputs import (
    check_held_out,
    choose_kernels,
    choose_layout,
    load_data,
    load_model,
    read_hashes,
    references_ahead,
    references_of,
)
from rankalign.training.locate import locate, read_by
from rankalign.training.moving import MovingReference
from rankalign.training.plan.verdict import checkpointing
from rankalign.training.rank import RankTrainer, Watch
from rankalign.training.reward import RewardTrainer, start_at_zero
from rankalign.training.settings import ModelSettings


def train(config: TrainConfig, watch_of: Callable[[TrainConfig], Watch | None] | None = None) -> dict[str, Any]:
    """Train as ``config`` says and leave model, ``log.jsonl`` and manifest in ``config.output_dir``.

    Args:
        config: settings.
        watch_of: makes what measures the model at each evaluation, beside the held-out lists; called when the data
            are files and the run is known to be unfinished.

    Returns:
        ``{"output", "steps", "counts", "metrics", "seconds", "already_finished"}``.

    Raises:
        InputError: bad settings or data.
        Interrupted: stopped by a signal; the same call goes on from the checkpoint.
    """
    reads = read_by(config)
    locate(config)
    add_tokens(config)  # first: the copy that knows the tokens is the start model, whose hash follows
    output = Path(str(config.output_dir))
    loss = config.loss_settings
    hashes = read_hashes(config.data_settings, config.model_settings, loss.method)
    settings = {**config.own_settings(), **hashes}
    with PartialState().main_process_first():  # one removes it, and the others find it gone
        outputs.begin(output, reads, bool(config.overwrite))
    if manifest.is_finished(output, settings):
        print(f"{output} is finished already with these settings: nothing to do", file=sys.stderr)
        return {**summary(output, manifest.read(output) or {}), "already_finished": True}
    choose_kernels(config.run_settings)
    on_cpu = models.device().type == "cpu"
    if on_cpu:
        heap.settle()
    begun(config, settings)  # refused before the model is loaded and references are computed
    if processes.is_first():
        check_writable(output)
    say(config, checkpointing(config))
    watch = watch_of(config) if watch_of else None
    set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model)
    lists, held_out, counts = load_data(config.data_settings, loss, tokenizer)
    check_held_out(held_out, config.eval_strategy != "no", config.metric_for_best_model)
    model = spread.load(config, tokenizer) if spread.by_parts(config) else None
    if model is None:
        axes = config.data_settings.axis_names
        with processes.whole_weights(config):
            model = load_model(config.model_settings, tokenizer, loss.grades, config.weights_dtype, axes)
    everything = Joined(lists, held_out)
    check_fit(model, everything)
    batch = config.per_device_train_batch_size
    with sharded.run_by_layers(model):  # there is no trainer yet, whose engine would gather weights
        layout, why = choose_layout(config.layout, model, lists, batch, loss.grades, config.precision)
        print(f"layout: {layout} ({why})", file=sys.stderr)
        references, cut, ahead = None, len(lists), references_ahead(config, model, layout)
        if ahead is None:
            # Before there is a trainer: they are of the start model.
            of_model, budget = config.model_settings, config.token_budget
            references = references_of(of_model, loss, config.precision, model, layout, everything, budget)
    if loss.grades:
        start_at_zero(model)  # behind the choice of a layout, with which zeros would always agree
    trainer = (RewardTrainer if loss.grades else RankTrainer)(
        model,
        config,
        Examples(lists, references and references[:cut]),
        Examples(held_out, references and references[cut:]),
        layout,
        processing_class=tokenizer,
        callbacks=callbacks(config, output),
    )
    processes.check_type(trainer.accelerator.distributed_type, config.fsdp, config.deepspeed)
    if trainer.is_deepspeed_enabled:
        processes.save_whole(trainer.accelerator.state.deepspeed_plugin)
    trainer.watch, trainer.references = watch, ahead
    if ahead is not None:
        trainer.follow(ahead.start)  # one copy for all
    with heap.trimmed(model, within=not config.compiled_by) if on_cpu else contextlib.nullcontext():
        run_trainer(trainer, config, settings)
    if ahead is not None and ahead.cache is not None:
        print(ahead.cache.said(), file=sys.stderr)
    say_rounding(trainer.state.log_history, config.rounding)
    save(trainer, tokenizer, output, config.model_settings)
    facts = {"counts": counts, "metrics": trainer.state.log_history[-1], "seconds": trainer.tally.total_seconds()}
    facts["steps"] = trainer.state.global_step
    if measured := last_measured(trainer.state):
        facts["evaluation"] = measured
    if processes.is_first():
        conclude(config, output, settings, facts)
    PartialState().wait_for_everyone()  # no process returns before the manifest is there
    return {**summary(output, facts), "already_finished": False}


def say_rounding(history: Sequence[Mapping[str, Any]], rounding: torch.dtype | None) -> None:
    """Say on stderr how many pairs a run in 16 bits told apart by digits that its layers do not have."""
    near, pairs = (sum(line.get(name, 0) for line in history) for name in ("within_rounding", "pairs"))
    if near:
        kind = str(rounding).removeprefix("torch.")
        print(f"{near:.0f} of {pairs:.0f} pairs met while training differ by less than {kind} tells apart: their order "
              "is rounding (within_rounding in log.jsonl)", file=sys.stderr)  # fmt: skip


def last_measured(state: TrainerState) -> dict[str, float]:
    """What was measured on held-out data of the weights that are kept, without ``eval_``; empty where nothing was."""
    lines = [line for line in state.log_history if "eval_loss" in line]
    best = [line for line in lines if line.get("step") == state.best_global_step]
    figures = (best or lines or [{}])[-1]
    return {name.removeprefix("eval_"): value for name, value in figures.items() if name.startswith("eval_")}


def conclude(config: TrainConfig, output: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the model card, and last the manifest."""
    write_card(output, config.method, config.model, config.asked_data, settings, facts)
    outputs = [p for p in sorted(output.iterdir()) if p.is_file() and p.suffix != ".bin" and p.name != "manifest.json"]
    manifest.write(output, "train", settings, config.data_settings.paths, outputs, **facts)


def summary(output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What a run returns, from its manifest's facts."""
    return {"output": str(output), **{key: facts[key] for key in ("steps", "counts", "metrics", "seconds")}}


# --- the run -----------------------------------------------------------------------------------------------------


class JsonlLog(TrainerCallback):
    """Keeps ``log.jsonl`` equal to the trainer's history, also after a resume from an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the new line, and show it where no progress bar does.

        The first time all lines are written, atomically: a resume goes back to the checkpoint's, and a kill may have
        cut the last one. After that they are appended, each in one write; a file that is rewritten at every step
        grows with the square of the steps.
        """
        if not state.is_world_process_zero:
            return
        lines = [dumps(without_nan(without(line))) + "\n" for line in state.log_history[self.written :]]
        if self.written and self.path.exists():
            with open(self.path, "ab", buffering=0) as out:
                out.write("".join(lines).encode())
        else:
            lines = [dumps(without_nan(without(line))) + "\n" for line in state.log_history]
            write_text(self.path, "".join(lines))
        self.written = len(state.log_history)
        if args.disable_tqdm:
            line = without(state.log_history[-1])
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
        self.agree()
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control

    def agree(self) -> None:
        """Have all processes stop at one update, whichever of them the signal came to."""
        if PartialState().num_processes > 1:
            self.caught = int(reduce(torch.tensor(self.caught, device=PartialState().device), "sum"))

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


def callbacks(config: TrainConfig, output: Path) -> list[TrainerCallback]:
    """Diagnosis, log and, where asked for, early stopping."""
    stop = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else []
    # In this order: the first adds to the line that the second writes.
    return [Diagnosis(), JsonlLog(output / "log.jsonl"), *stop]


def run_trainer(trainer: RankTrainer, config: TrainConfig, settings: dict[str, Any]) -> None:
    """Train from the start or the newest checkpoint, to the end or a signal.

    Args:
        trainer: made of the model and its lists.
        config: settings.
        settings: the run's identity, which every checkpoint carries.

    Raises:
        InputError: there is a checkpoint that the settings forbid to resume, or one of other settings or data.
        Interrupted: stopped by a signal, after a checkpoint.
    """
    last = begun(config, settings)
    if last:
        print(f"resuming from {last}", file=sys.stderr)
    if config.save_only_model and config.save_strategy != "no":
        print("--save_only_model: if this run is stopped it cannot go on from its checkpoints", file=sys.stderr)
    trainer.identity = settings
    if isinstance(trainer.start, MovingReference):
        trainer.start.resume_from = last
    if config.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.add_callback(Launch(trainer))
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        stop.restore()
    # One that fell into the last update cut nothing short.
    if stop.caught and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; the same command goes on from its checkpoint")


def begun(config: TrainConfig, settings: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, if there is one: the newest, or the one of ``--resume_from_checkpoint``.

    Raises:
        InputError: it is not there, may not be resumed, or belongs to a run of other settings or data.
    """
    output, named = Path(str(config.output_dir)), config.resume_from_checkpoint
    last = last_checkpoint(output)
    if named is not None and str(named).lower() not in ("true", "false"):
        if not (Path(named) / "trainer_state.json").is_file():
            raise InputError(f"--resume_from_checkpoint {named}: no such checkpoint")
        last = str(named)
    elif str(named).lower() == "true" and not last:
        raise InputError(f"--resume_from_checkpoint: {output} holds no checkpoint")
    if last and (not config.resume or str(named).lower() == "false"):
        raise InputError(
            f"{output} holds {Path(last).name} of an earlier run; resume it or start over with --overwrite"
        )
    if last:
        check_same_run(Path(last), settings)
    return last


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint of a run; one that a kill left half written, without its last file, does not count."""
    whole = [p.parent for p in output.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    # Behind `checkpoint-`; names sort 100 before 20.
    return str(max(whole, key=lambda p: int(p.name[11:]))) if whole else None


def save(trainer: RankTrainer, tokenizer: PreTrainedTokenizerBase, output: Path, settings: ModelSettings) -> None:
    """The final weights, in the type of the start model's, and tokenizer, loadable by transformers (or peft) alone."""
    trainer.save_model(str(output))  # on all ranks, each of which may hold a shard
    if processes.is_first():
        tokenizer.save_pretrained(str(output))
        saving.finish(output, None if settings.use_lora else models.local_folder(settings.model), settings.keep_float32)
