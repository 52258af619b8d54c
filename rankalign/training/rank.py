"""The rank trainer: transformers' Trainer with one hook, ``values``, and a loss that is a mean over prompts.

The mean is over the prompts of a whole update: it does not change with micro-batches, accumulation or ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rankalign.errors import InputError
from rankalign.models import sharded
from rankalign.rows.checks import Checks
from rankalign.rows.compiled import compile_layers
from rankalign.rows.logps import list_logps, reference_at
from rankalign.rows.tree import tree_tokens
from rankalign.rows.two_pass import backward_two_pass, reference_in_chunks
from rankalign.rows.whole import Beyond, Reference
from rankalign.storage.folders import readable
from rankalign.training import in_step, processes
from rankalign.training.ahead import Beside, References, StartModel
from rankalign.training.arguments import TrainConfig
from rankalign.training.dashboards import Dashboards
from rankalign.training.examples import Example, ExampleSet, check_ids, collate, to_ranked, token_ids, unlearned
from rankalign.training.identity import note
from rankalign.training.ledger import NAME, Ledger, LedgerFile
from rankalign.training.meter import Meter
from rankalign.training.moving import MovingReference
from rankalign.training.packing import RowFill, pack
from rankalign.training.processes import keep_digits
from rankalign.training.router_loss import refuse_two_passes, router_loss
from rankalign.training.tally import Tally

Watch = Callable[[Any], Mapping[str, float]]
"""Measures a model while it trains: figures by name."""


class BeforeUpdate(TrainerCallback):
    """Looks at what had to hold, once the gradient is whole and before the weights take it in."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise what was found."""
        self.checks.settle()


class RankTrainer(Trainer):
    """Trains on lists of candidates with any loss of :data:`rankalign.losses.LOSSES`.

    Args:
        model: the policy.
        config: settings.
        train: examples to train on.
        evaluation: examples to measure while training.
        layout: how rows are laid out for log-probabilities, see :func:`rankalign.rows.logps.list_logps`.
        **more: passed to transformers' Trainer.
    """

    # compute_loss divides by the prompts of the whole update itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train: Sequence[Example],
        evaluation: Sequence[Example] = (),
        layout: str = "auto",
        **more: Any,
    ) -> None:
        check_ids(train)
        super().__init__(
            model=model,
            args=config,
            train_dataset=ExampleSet(train),
            eval_dataset=ExampleSet(evaluation) if len(evaluation) else None,
            data_collator=collate,
            **more,
        )
        if config.compiled_by:
            layers = compile_layers(model, *config.compiled_by)
            print(f"torch.compile: the MLPs of {layers} layers, by {config.compiled_by[0]}", file=sys.stderr)
        self.model_accepts_loss_kwargs = False
        self.config, self.layout, self.held_out = config, layout, evaluation
        self.loss, self.keywords = config.loss_entry, config.loss_keywords()
        self.router_loss = router_loss(config, model)
        ledger = Ledger()
        beta = {**config.loss_entry.defaults, **self.keywords}.get("beta")
        self.dashboards = Dashboards(beta if isinstance(beta, float | int) else 1.0) if config.report_to else None
        self.meter = Meter(ledger, config.rounding, self.dashboards)
        self.row_fill = RowFill()
        self.watch: Watch | None = None
        self.references: References | None = None
        self.start: Beside = StartModel(config.model_settings, config.weights_dtype)
        self.identity: dict[str, Any] = {}
        self.ledger_file = LedgerFile(ledger, Path(str(config.output_dir)) / NAME)
        self.add_callback(self.ledger_file)
        self.tally = Tally()
        self.add_callback(self.tally)
        self.checks = Checks()
        self.add_callback(BeforeUpdate(self.checks))

    def follow(self, start: Beside) -> None:
        """Take this for the reference, which may be one that moves."""
        self.start = start
        if isinstance(start, MovingReference):
            self.add_callback(start)

    def create_accelerator_and_postprocess(self) -> None:
        """Also where FSDP2 has spread the model before there was a trainer."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        keep_digits(plugin)
        if plugin is not None and plugin.fsdp_version == 2:
            processes.resume_by_shards(plugin)
        if isinstance(self.model, FSDPModule):
            processes.take_spread(self.accelerator, self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights, by tensors and files where processes share them or copies of more digits, so that none holds the
        whole model."""
        model: Any = self.model
        if not (sharded.is_spread(model) or sharded.has_masters(model)):
            super().save_model(output_dir, _internal_call)
            return
        folder, first = Path(output_dir or str(self.args.output_dir)), self.is_world_process_zero()
        sharded.save(model, folder, first)
        if first and self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))

    def values(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Values of the candidates that the loss compares, (P, N): log-probabilities here, (P, N, T) by token where the
        loss needs them, rewards in a subclass."""
        more: dict[str, Any] = {"unlearned": unlearned([e.tokens for e in examples]), "tokens": self.loss.needs_tokens}
        more["beyond"] = self._beyond(lambda of: reference_at(of, *token_ids(examples), layout=self.layout))
        return list_logps(model, *token_ids(examples), layout=self.layout, **more)

    def _beyond(self, at: Callable[[Any], Reference]) -> Beyond:
        """What the loss reads beside log-probabilities; ``at`` runs the reference over the same tokens."""
        if not self.loss.needs_kls:
            return Beyond(self.loss.needs_squares)
        with self.start.beside(self.model, self.state.global_step == 0) as reference:
            reference.eval()
            return Beyond(self.loss.needs_squares, at(reference))

    def losses(self, model: nn.Module, examples: Sequence[Example], meter: Meter) -> Tensor:
        """(P,) loss of each prompt, metered."""
        return self.losses_of(self.values(model, examples), examples, meter)

    def losses_of(self, logps: Tensor, examples: Sequence[Example], meter: Meter) -> Tensor:
        """(P,) loss of each prompt from the candidates' log-probabilities as :meth:`values` gives them, metered."""
        ranked = to_ranked(examples, logps, self.loss.beyond)
        losses = self.loss.function(ranked, **self.keywords)
        parts = self.loss.parts(ranked, **self.keywords)
        if self.router_loss is not None:
            losses, parts = self.router_loss.add(losses, parts)
        meter.add(ranked, losses, parts, ids=[e.tokens.id for e in examples])
        return losses

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision as asked for. accelerate wraps the model's forward in it, which our rows do not pass."""
        return self.accelerator.autocast()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one update and the number of prompts in them, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = self._without_repeats(batches[-1])
        batches = self.listed(batches)
        if batches and self.config.batch_by == "tokens":
            batches = self._in_even_rows(batches)
        batches = self._referred(batches)
        prompts = torch.tensor(sum(e.counts for batch in batches for e in batch["examples"]))
        if self.sharded:
            self._agree(batches)
        if self.args.world_size > 1:
            prompts = self.accelerator.gather(prompts.to(device)).sum()
        return batches, prompts

    def listed(self, batches: list[Any]) -> list[Any]:
        """The batches as they are learned from; a subclass may put other lists in the place of those drawn."""
        return batches

    def _referred(self, batches: list[Any]) -> list[Any]:
        """The batches, each example with what the start model gives it, computed for all of them at once."""
        if self.references is None:
            return batches
        lists = [example.tokens for batch in batches for example in batch["examples"]]
        if self.state.epoch is not None and self.state.epoch >= 1 and not self.loss.needs_kls:
            self.references.start.forget()  # all is known from here on, but perhaps of what is held out
        found = iter(self.references.of(self.model, lists, untouched=self.state.global_step == 0))
        return [
            {**batch, "examples": [replace(e, ref_logps=next(found)) for e in batch["examples"]]} for batch in batches
        ]

    def _in_even_rows(self, batches: list[Any]) -> list[Any]:
        """The same update, the lists of all its micro-batches and processes laid anew into rows of like size.

        The loss is a sum over prompts, so who runs them beside whom changes nothing but rounding. All rows of this
        process are parts of its last micro-batch; the trainer counts the others, which are empty.
        """
        every = gather_object([e for batch in batches for e in batch["examples"] if e.counts])
        rank, world = self.args.process_index, self.args.world_size
        rows = pack(every, self._size, self.config.token_budget, world)
        self.row_fill.add([self._size(row) for row in rows if row], len(rows), self.config.token_budget)
        own = [row for row in rows[rank::world] if row] or [[replace(every[0], counts=False)]]
        last = {"examples": [e for row in own for e in row], "rows": [len(row) for row in own]}
        return [*({"examples": []} for _ in batches[1:]), last]

    def _agree(self, batches: list[Any]) -> None:
        """Tell every micro-batch how often the process that has the most of it to run calls the model."""
        own = [in_step.work(self, self._parts_of(batch)).passes for batch in batches]
        shares = gather_object([own])
        for i, batch in enumerate(batches):
            batch["passes"] = tuple(max(share[i][k] for share in shares) for k in range(2))

    def _without_repeats(self, batch: dict[str, list[Example]]) -> dict[str, list[Example]]:
        """This rank's last batch of an epoch, less what accelerate put behind the last prompts from the beginning so
        that all ranks have as many; a rank with nothing left runs one example that does not count."""
        each, examples = self.args.train_batch_size, batch["examples"]
        dataset: Any = self.train_dataset
        left = len(dataset) % (each * self.args.world_size)
        if not left or self.args.dataloader_drop_last:
            return batch
        own = examples[: max(left - each * self.args.process_index, 0)]
        return {"examples": own or [replace(examples[0], counts=False)]}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, in parts that fit in the token budget.

        The loss is a sum over prompts, so parts of whole lists add up to it; a list that exceeds the budget on its own
        runs in two passes. Ranks of data-parallel training meet in the last part, those that share their weights in
        every one.
        """
        if not inputs["examples"]:
            return torch.zeros((), device=self.args.device)
        parts = self._parts_of(inputs)
        if self.sharded:
            together = in_step.Step(self, model, num_items_in_batch, parts[0][0])
            loss = together.run(in_step.work(self, parts), inputs["passes"], super().training_step)
            self.tally.add(loss)
            return loss
        total: Tensor | float = 0.0
        for i, part in enumerate(parts):
            with self.accelerator.no_sync(model) if i < len(parts) - 1 else nullcontext():
                step = self._two_pass_step if self.in_two_passes(part) else super().training_step
                total = total + step(model, {"examples": part}, num_items_in_batch)
        self.tally.add(torch.as_tensor(total))
        return torch.as_tensor(total)

    def _parts_of(self, batch: Mapping[str, Any]) -> list[list[Example]]:
        """The parts of a micro-batch, which may have none."""
        if "rows" in batch:
            return _cut(batch["examples"], batch["rows"])
        return self._parts(batch["examples"]) if batch["examples"] else []

    def _parts(self, examples: list[Example]) -> list[list[Example]]:
        """The examples, in order, in groups within the budget."""
        parts = [examples[:1]]
        for example in examples[1:]:
            if self._size([*parts[-1], example]) <= self.config.token_budget:
                parts[-1].append(example)
            else:
                parts.append([example])
        return parts

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients or the optimiser's state are spread over the processes."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def _size(self, examples: Sequence[Example]) -> int:
        """Tokens of the rows that these lists fill."""
        lists = [e.tokens for e in examples]
        if self.layout != "padded":
            return sum(tree_tokens(len(t.prompt), [len(r) for r in t.responses]) for t in lists)
        return sum(len(t.responses) for t in lists) * max(len(t.prompt) + max(map(len, t.responses)) for t in lists)

    def in_two_passes(self, part: list[Example]) -> bool:
        """Whether these examples run twice, first for their log-probabilities alone."""
        if self.config.two_pass != "auto":
            return self.config.two_pass == "always"
        asked = self.config.can_two_pass and self._size(part) > self.config.token_budget
        if asked:
            refuse_two_passes(self.router_loss, self._size(part), self.config.token_budget)
        return asked

    def _two_pass_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        model.train()
        examples = inputs["examples"]

        def loss_of(logps: Tensor) -> Tensor:
            return self.share(self.losses_of(logps, examples, self.meter_of(examples)), examples, num_items_in_batch)

        budget, backward = self.config.token_budget, self.accelerator.backward
        with self.compute_loss_context_manager():
            how: dict[str, Any] = {"layout": self.layout, "backward": backward, "checks": self.checks}
            how |= {"unlearned": unlearned([e.tokens for e in examples]), "tokens": self.loss.needs_tokens}
            how["beyond"] = self._beyond(lambda of: reference_in_chunks(of, *token_ids(examples), budget, self.layout))
            return backward_two_pass(model, *token_ids(examples), loss_of, budget, **how)[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over the update's prompts.

        Raises:
            InputError: the loss is not finite; on a GPU just before the update, so that nothing waits for it here.
        """
        examples = inputs["examples"]
        loss = self.share(self.losses(model, examples, self.meter_of(examples)), examples, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def meter_of(self, examples: Sequence[Example]) -> Meter:
        """Where these examples are metered: nowhere if they do not count."""
        return self.meter if examples[0].counts else Meter()

    def share(self, losses: Tensor, examples: Sequence[Example], prompts: Tensor | int | None) -> Tensor:
        """What these losses (P,) add to the mean over the prompts of the update; one that is not finite is refused."""
        self.checks.require(torch.isfinite(losses), partial(_not_finite, [e.tokens.id for e in examples]))
        prompts = prompts if prompts is not None else len(losses)
        # Times 0, and not left out, where it does not count: the other ranks wait for this one's backward.
        counted = losses.sum() * examples[0].counts
        return counted * (self.accelerator.num_processes / prompts)  # ranks are averaged afterwards

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss, its parts and accuracies on the held-out examples, each a mean over all of them.

        Processes share the batches; one that is left without runs the first again, unmetered, for all must run alike.
        """
        meter, size, world = (
            Meter(dashboards=self.dashboards),
            self.args.per_device_eval_batch_size,
            self.args.world_size,
        )
        model: Any = self.model_wrapped
        batches = [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]
        count = len(batches)
        batches += batches[:1] * (-count % world)
        with _eval_mode(model), self.compute_loss_context_manager():
            for i in range(self.args.process_index, len(batches), world):
                (batch,) = self._referred([{"examples": batches[i]}])
                self.losses(model, batch["examples"], meter if i < count else Meter())
            seen = self.watch(self.model) if self.watch is not None else {}
        # Before read, which empties the meter.
        more = {f"eval_{name}": value for name, value in {**meter.accuracy_bounds(), **seen}.items()}
        metrics = meter.read("eval_") | more
        self.log(metrics)
        # As Trainer.evaluate does: early stopping and the best checkpoint wait for it.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.ledger_file.save(self.state)  # before the checkpoint: a resume finds the entries of all its steps
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_world_process_zero():  # before trainer_state.json, without which a checkpoint is not whole
            note(folder, self.identity, whole=not self.args.save_only_model)
            if isinstance(self.start, MovingReference):
                self.start.save(folder)
        self.tally.keep(self.state, self.accelerator)
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero() and folder.is_dir():
            readable(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the exact means since the last line in the place of the trainer's rounded ones."""
        if "loss" in logs:
            logs = {**logs, **self.meter.read(), **self.row_fill.read()}
        if "train_loss" in logs:
            logs = self.tally.whole(logs, self.state, self.accelerator)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x weights x tokens, prompts counted once."""
        lists = [e.tokens for e in inputs["examples"]]
        tokens = sum(len(t.prompt) + sum(map(len, t.responses)) for t in lists)
        model: Any = self.model
        return 6 * tokens * sum(int(p.numel()) for p in model.parameters())  # 2 a weight and token forward, 4 backward


def _cut(examples: list[Example], sizes: Sequence[int]) -> list[list[Example]]:
    """The examples in groups of so many."""
    rest = iter(examples)
    return [list(islice(rest, size)) for size in sizes]


def _not_finite(ids: Sequence[str], fine: Sequence[bool]) -> InputError:
    names = ", ".join(ident for ident, good in zip(ids, fine, strict=True) if not good)
    return InputError(f"the loss is not finite for prompts {names}; lower --learning_rate or --beta")


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
