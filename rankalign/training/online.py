"""Online rank training (OP-k): the model answers the prompts it is about to learn from, anew every k updates.

Optimiser, schedule and step count are those of one run; only the lists change under it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import set_seed

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.sharded import is_spread
from rankalign.models.whole import Whole
from rankalign.storage import manifest, outputs
from rankalign.storage.files import atomic_writer
from rankalign.storage.folders import check_writable
from rankalign.training import inputs, processes, run
from rankalign.training.added_tokens import add_tokens
from rankalign.training.arguments import TrainConfig
from rankalign.training.defaults import say
from rankalign.training.examples import Example
from rankalign.training.fit import check_fit
from rankalign.training.locate import read_by
from rankalign.training.moving import MovingReference
from rankalign.training.rank import RankTrainer, Watch
from rankalign.training.tokens import OFF, encode


@dataclass(frozen=True)
class Block:
    """The updates between two refreshes.

    Attributes:
        number: its place, from 1.
        step: how many updates are made before it.
        updates: how many it makes.
        prompts: indices of the prompts that they need, each once, in the order in which they come.
        written: how many updates had been made of the weights that answer it: as many as before it, or a block fewer
            where answers are written ahead.
    """

    number: int
    step: int
    updates: int
    prompts: list[int]
    written: int


@dataclass(frozen=True)
class Answered:
    """The candidates of a block.

    Attributes:
        path: the file of scored candidates.
        weights: the folder of the weights that wrote them; empty where they are those in memory.
    """

    path: Path
    weights: str = ""


Refresh = Callable[[Any, Block, bool], Answered]
"""Has the prompts of a block answered: called with the model in eval mode, the block, and whether no update of
it is made yet. A run resumed within a block calls it with False: the model has moved on since, and what was answered
then must be found again, not sampled."""

BY_RATIO = ("rloo_clipped", "gspo")
"""Losses whose reference is the policy that wrote the answers: they correct by the ratio to it."""


def blocks(prompts: int, per_update: int, updates: int, every: int, ahead: int = 0) -> Iterator[Block]:
    """All blocks of a run that walks through the prompts in order, again and again.

    Args:
        prompts: how many there are.
        per_update: how many an update takes; the last of a pass takes what is left.
        updates: how many the run makes.
        every: how many a block makes.
        ahead: how many blocks before its own the weights are taken that answer a block.
    """
    a_pass = math.ceil(prompts / per_update)
    for start in range(0, updates, every):
        end = min(start + every, updates)
        firsts = [update % a_pass * per_update for update in range(start, end)]
        needed = dict.fromkeys(i for first in firsts for i in range(first, min(first + per_update, prompts)))
        yield Block(start // every + 1, start, end - start, list(needed), max(0, start - ahead * every))


def plan(config: TrainConfig, prompts: int, every: int, ahead: int = 0) -> list[Block]:
    """The blocks of a run with these settings; arguments as for :func:`blocks`.

    Raises:
        InputError: settings that an online run cannot have.
    """
    if config.train_sampling_strategy != "sequential":
        raise InputError("online training walks through the prompts in order: leave train_sampling_strategy out")
    if config.batch_by != "prompts":
        raise InputError("online training runs the micro-batches that it draws: leave batch_by out")
    if config.dataloader_drop_last:
        raise InputError("online training takes every prompt: leave dataloader_drop_last out")
    if config.sync_ref_model and by_ratio(config.loss):
        raise InputError(f"--sync_ref_model: online, the reference of loss {config.loss!r} is who wrote the answers")
    if config.sync_ref_model and config.ref_model_sync_steps % every:
        raise InputError(
            f"--ref_model_sync_steps {config.ref_model_sync_steps}: answers and their reference are refreshed together "
            f"here, so take a multiple of refresh_every, {every}"
        )
    per_update = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    epochs = math.ceil(config.num_train_epochs * math.ceil(prompts / per_update))
    return list(blocks(prompts, per_update, config.max_steps if config.max_steps > 0 else epochs, every, ahead))


def by_ratio(loss: str) -> bool:
    """Whether the reference of a loss, or of a part of a mixture, is the policy that wrote the answers."""
    return any(name in BY_RATIO for name in re.findall(r"[a-z_]+", loss))


class StartModel:
    """The model as it was before training, for references; loaded once, and only if asked for.

    Args:
        name: where its weights lie.
        below_adapter: it is what the trained model computes with its adapter off; no second copy is needed.

    Attributes:
        dtype: of the second copy's weights.
    """

    dtype = "float32"

    def __init__(self, name: str, below_adapter: bool = False) -> None:
        self.name, self.below_adapter = name, below_adapter

    @functools.cached_property
    def _loaded(self) -> Any:
        return models.load_policy(self.name, dtype=self.dtype)

    def forget(self) -> None:
        """Give its memory back; it is loaded again if need be."""
        self.__dict__.pop("_loaded", None)

    @contextlib.contextmanager
    def beside(self, model: Any, untouched: bool = False) -> Iterator[Any]:
        """The start model of ``model``, for as long as the context lasts, whether ``untouched`` or not."""
        if not self.below_adapter:
            yield self._loaded
            return
        with model.disable_adapter():
            yield model


class OnlineTrainer(RankTrainer):
    """Trains on lists that it has its own model write, block by block.

    Args:
        model: the policy.
        config: settings.
        ids: ids of all prompts, in order.
        plan: the blocks of the run.
        refresh: makes a block's candidates.
        start: the start model, for losses that need a reference.
        evaluation: examples to measure while training.
        **more: passed to transformers' Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        ids: Sequence[str],
        plan: Sequence[Block],
        refresh: Refresh,
        start: StartModel,
        evaluation: Sequence[Example] = (),
        **more: Any,
    ) -> None:
        # Order and number of updates come from the prompts alone; the lists come with their block.
        places = [Example(TokenList(ident, [], [], [])) for ident in ids]
        self.whole = Whole(model) if processes.spreads_weights(config) else None
        super().__init__(model, config, places, evaluation, config.layout, **more)
        if self.whole is not None and (narrow := processes.layers_in(self.accelerator)) is not None:
            # As the policy computes while it learns, so that no rounding parts it from what it is compared with.
            self.whole.dtype, start.dtype = narrow, str(narrow).removeprefix("torch.")
        self.plan, self.refresh = plan, refresh
        self.follow(MovingReference(config.loss_settings) if config.sync_ref_model else start)
        self.block: Block | None = None
        self.lists: dict[str, Example] = {}

    def enter(self, step: int) -> None:
        """Have the lists of the block that update ``step`` (from 0) belongs to."""
        if self.block and self.block.step <= step < self.block.step + self.block.updates:
            return
        self.block = next(block for block in self.plan if block.step <= step < block.step + block.updates)
        own: Any = self.model
        training = own.training
        own.eval()
        with self._entire() as model:
            self._take(self.block, model, step == self.block.step)
        own.train(training)

    def hold_out(self, lists: Sequence[TokenList]) -> None:
        """Take these for what is measured, in the layout that :meth:`enter` has chosen."""
        with self._entire() as model:
            self.held_out = self.referred(model, lists)

    @contextlib.contextmanager
    def _entire(self) -> Iterator[Any]:
        """The model with all its weights in each process, as have those that are loaded beside it."""
        model: Any = self.model
        copied = self.whole is not None and (is_spread(model) or self.whole.dtype is not None)
        with (
            processes.whole_weights(self.config),
            self.whole.now(model) if self.whole and copied else contextlib.nullcontext(model) as entire,
        ):
            yield entire
        if self.whole is not None:
            self.start.forget()  # training has no room beside it

    def _take(self, block: Block, model: Any, fresh: bool) -> None:
        """Have a block's lists, answered by ``model`` where no update of it is made yet."""
        with torch.random.fork_rng():  # what is read from disk after a kill must leave the same state as what was made
            answered = self.refresh(model, block, fresh)
        tokenizer: Any = self.processing_class
        of_data = replace(self.config.data_settings, token_cache=OFF)  # nobody reads this file again
        lists, counts = encode(of_data, tokenizer, str(answered.path), self.config.loss == "sft")
        inputs.say_counts(counts)
        inputs.check_own(self.config.loss_entry, self.config.loss, counts, str(answered.path))
        check_fit(model, lists)
        if self.layout == "auto" and lists:
            batch = self.config.per_device_train_batch_size
            # No lists were there when the trainer was made.
            own: Any = self.model
            own = model if is_spread(own) else own  # else what is found out about it is kept with it
            self.layout, why = inputs.choose_layout(self.layout, own, lists, batch, precision=self.config.precision)
            print(f"layout: {self.layout} ({why})", file=sys.stderr)
        ratio = by_ratio(self.config.loss)
        found = self.by_writer(model, lists, answered, fresh) if ratio else self.referred(model, lists)
        self.lists = {example.tokens.id: example for example in found}

    def by_writer(self, own: Any, lists: Sequence[TokenList], answered: Answered, fresh: bool) -> list[Example]:
        """Lists with their log-probabilities under the weights that wrote them, which are kept beside them: within the
        block those weights are gone.

        Raises:
            InputError: they are gone as well.
        """
        kept = answered.path.with_name("written_logps.safetensors")
        if not kept.exists():
            if not (fresh or answered.weights):
                raise InputError(f"{kept} is gone, of which the checkpoint has learned a part; start with --overwrite")
            writer = StartModel(answered.weights) if answered.weights else None
            with writer.beside(own) if writer else contextlib.nullcontext(own) as model:
                found: Any = self.under(model, lists)
            rows = {example.tokens.id: example.ref_logps.clone() for example in found}  # of no shared memory
            if processes.is_first():
                with atomic_writer(kept) as out:
                    out.write(save(rows))
            PartialState().wait_for_everyone()
        logps = load_file(kept)
        return [Example(tokens, logps[tokens.id]) for tokens in lists]

    def referred(self, own: Any, lists: Sequence[TokenList]) -> list[Example]:
        """Lists with their log-probabilities under the start model of ``own``, where the loss needs them."""
        if not lists or not self.config.loss_entry.needs_reference:
            return [Example(tokens) for tokens in lists]
        with self.start.beside(own, untouched=self.state.global_step == 0) as reference:
            return self.under(reference, lists)

    def under(self, reference: Any, lists: Sequence[TokenList]) -> list[Example]:
        """Lists with their log-probabilities under a model; each process computes its share."""
        budget, tokens = self.config.token_budget, self.config.loss_entry.needs_tokens
        own = processes.share(lists)
        rows = inputs.start_logps(self.config.precision, reference, self.layout, own, budget, tokens=tokens)
        rows = processes.together(rows)
        return [Example(tokens, row) for tokens, row in zip(lists, rows, strict=True)]

    def listed(self, batches: list[Any]) -> list[Any]:
        """The lists of one update, which the weights of the block's beginning have written.

        A prompt of which no candidate is usable is left out; its count is said when the block begins. A process that
        is left with nothing runs a list that does not count where others have some: they meet in each backward.
        """
        self.enter(self.state.global_step)
        ids = [[e.tokens.id for e in batch["examples"] if e.counts] for batch in batches]
        found = [{"examples": [self.lists[i] for i in batch if i in self.lists]} for batch in ids]
        if self.args.world_size > 1 and any(gather_object([any(batch["examples"] for batch in found)])):
            idle = [replace(next(iter(self.lists.values())), counts=False)]
            return [batch if batch["examples"] else {"examples": idle} for batch in found]
        return found

    def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
        """As :meth:`RankTrainer.evaluate`, by the reference of now where it moves."""
        if isinstance(self.start, MovingReference):
            self.held_out = self.referred(self.model, [example.tokens for example in self.held_out])
        return super().evaluate(*args, **more)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As :meth:`RankTrainer.training_step`; nothing where no list of the micro-batch is left."""
        if not inputs["examples"]:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Say with each line which block it belongs to and at which step its lists were written."""
        if "loss" in logs and self.block:
            logs = {**logs, "round": self.block.number, "refreshed_at": self.block.written}
        super().log(logs, start_time)


def train_online(
    config: TrainConfig,
    ids: Sequence[str],
    plan: Sequence[Block],
    refresh: Refresh,
    start: StartModel,
    watch: Watch | None = None,
    **decisive: Any,
) -> dict[str, Any]:
    """Train as ``config`` says on the lists of ``refresh``; leave what :func:`rankalign.training.run.train` leaves.

    Args:
        config: settings; ``data`` is the file of the prompts.
        ids: ids of all prompts, in order.
        plan: the blocks of the run, from :func:`plan`.
        refresh: makes a block's candidates.
        start: the start model.
        watch: measures the model at each evaluation.
        **decisive: what else the result depends on, for the manifest.

    Returns:
        As :func:`rankalign.training.run.train`.

    Raises:
        InputError: bad settings or data.
        Interrupted: stopped by a signal; the same call goes on from the checkpoint.
    """
    reads = read_by(config)
    add_tokens(config)
    output = Path(str(config.output_dir))
    of_data, of_model = config.data_settings, config.model_settings
    hashes = inputs.read_hashes(of_data, of_model, config.method)
    settings = {**config.own_settings(), **hashes, **decisive}
    with PartialState().main_process_first():
        outputs.begin(output, reads, bool(config.overwrite))
    if manifest.is_finished(output, settings):
        return {**run.summary(output, manifest.read(output) or {}), "already_finished": True}
    run.begun(config, settings)
    if processes.is_first():
        check_writable(output)
    say(config)
    set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model)
    alone, eval_data = config.loss == "sft", of_data.eval_data
    held_out = encode(of_data, tokenizer, eval_data, alone)[0] if eval_data else []
    with processes.whole_weights(config):
        model = inputs.load_model(of_model, tokenizer, dtype=config.weights_dtype)
    trainer = OnlineTrainer(
        model,
        config,
        ids,
        plan,
        refresh,
        start,
        evaluation=[Example(tokens) for tokens in held_out],
        processing_class=tokenizer,
        callbacks=run.callbacks(config, output),
    )
    processes.check_type(trainer.accelerator.distributed_type, config.fsdp, config.deepspeed)
    trainer.enter(0)  # with the start weights, also when a checkpoint follows: they decide the layout
    trainer.hold_out(held_out)
    trainer.watch = watch
    run.run_trainer(trainer, config, settings)
    run.save(trainer, tokenizer, output, of_model)
    facts = {"counts": {"prompts": len(ids), "blocks": len(plan)}, "metrics": trainer.state.log_history[-1]}
    facts |= {"steps": trainer.state.global_step, "seconds": trainer.tally.total_seconds()}
    if processes.is_first():
        run.conclude(config, output, settings, facts)
    PartialState().wait_for_everyone()
    return {**run.summary(output, manifest.read(output) or {}), "already_finished": False}
