"""A micro-batch in parts on processes that share their weights, where each forward and backward takes all of them.

Sharded weights come from the other processes while a model runs, so all must run it equally often and in one order.
They agree on how often before each update; one that has less to run fills up with a token that adds nothing.

Two passes go by log-probs here, and not by hidden states as in :mod:`rankalign.rows.two_pass`: that saves the prompts'
and the last chunk's second forward, but calls for layers in an order that hangs on the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn.functional import pad

from rankalign.rows.logps import list_logps, supports_tree
from rankalign.rows.two_pass import Candidate, units
from rankalign.rows.whole import Beyond

Part = list[Any]  # examples that run together


@dataclass(frozen=True)
class Work:
    """What a process runs of a micro-batch.

    Attributes:
        short: parts within the token budget, which run once.
        long: parts that exceed it, each with its candidates by what runs at once.
    """

    short: list[Part]
    long: list[tuple[Part, list[list[Candidate]]]]

    @property
    def passes(self) -> tuple[int, int]:
        """How often the model runs: without gradient, and with."""
        chunks = sum(len(some) for _, some in self.long)
        return chunks, len(self.short) + chunks


def work(trainer: Any, parts: Sequence[Part]) -> Work:
    """Sort parts by whether they run in two passes.

    Args:
        trainer: the rank trainer.
        parts: of a micro-batch.
    """
    found = Work([], [])
    for part in parts:
        if trainer.in_two_passes(part):
            found.long.append((part, _chunks(trainer, part)))
        else:
            found.short.append(part)
    return found


def _chunks(trainer: Any, part: Part) -> list[list[Candidate]]:
    prompts, responses = [e.tokens.prompt for e in part], [e.tokens.responses for e in part]
    candidates = [(p, n) for p, row in enumerate(responses) for n, response in enumerate(row) if len(response)]
    tree = supports_tree(trainer.model) if trainer.layout == "auto" else trainer.layout == "tree"
    budget = trainer.config.token_budget
    return [chunk for unit in units(prompts, responses, candidates, budget, tree) for chunk in unit]


class Step:
    """Forward and backward of one micro-batch.

    Args:
        trainer: the rank trainer.
        model: wrapped.
        prompts: of the update, over all processes.
        spare: an example to be idle with.
    """

    def __init__(self, trainer: Any, model: Any, prompts: Tensor | int | None, spare: Any) -> None:
        self.trainer, self.model, self.prompts = trainer, model, prompts
        token = spare.tokens.prompt[:1]
        tokens = replace(spare.tokens, prompt=token, responses=[token], scores=[0.0], unlearned=[])
        self.spare = replace(spare, tokens=tokens, ref_logps=None, counts=False)

    def run(self, work: Work, most: tuple[int, int], whole: Any) -> Tensor:
        """The micro-batch's share of the loss, detached; gradients are left in the weights.

        Args:
            work: this process's.
            most: :attr:`Work.passes` of the process that has the most to run.
            whole: ``(model, inputs, prompts)``, forward and backward of a part that runs once.
        """
        if hasattr(self.model, "set_requires_gradient_sync"):
            # Else FSDP2 keeps the gradient of the whole model on each process until the last micro-batch.
            self.model.set_requires_gradient_sync(True)
        self.model.train()
        with torch.no_grad():
            seen = [self._first_pass(part, chunks) for part, chunks in work.long]
            for _ in range(most[0] - work.passes[0]):
                self._idle()
        total = torch.zeros((), device=self.trainer.args.device)
        todo: list[Callable[[], Tensor]] = [
            partial(whole, self.model, {"examples": part}, self.prompts) for part in work.short
        ]
        for (part, chunks), logps in zip(work.long, seen, strict=True):
            slopes, loss = self._slopes(part, logps)
            total += loss
            todo += [partial(self._second_pass, part, chunk, slopes) for chunk in chunks]
        todo += [self._idle_backward] * (most[1] - len(todo))
        state = self.trainer.accelerator.gradient_state
        last = state.sync_gradients  # DeepSpeed makes its update in the backward that is said to be the last
        for i, part_of_it in enumerate(todo):
            state._set_sync_gradients(last and i == len(todo) - 1)
            total += part_of_it().to(total.device)
        return total

    def _first_pass(self, part: Part, chunks: list[list[Candidate]]) -> Tensor:
        """(P, N) log-probs, or whatever else the loss reads of candidates."""
        values = [self._values(part, chunk) for chunk in chunks]
        logps = values[0].new_zeros(len(part), max(len(e.tokens.responses) for e in part), *values[0].shape[1:])
        for chunk, some in zip(chunks, values, strict=True):
            logps[_places(chunk, logps.device)] = some
        return logps

    def _values(self, part: Part, chunk: list[Candidate]) -> Tensor:
        """(candidates of the chunk, ...) log-probs, and what else the loss reads."""
        lists = [(part[p].tokens, [n for _, n in group]) for p, group in groupby(chunk, _prompt_of)]
        responses = [[tokens.responses[n] for n in some] for tokens, some in lists]
        spans = [[tokens.unlearned[n] for n in some] if tokens.unlearned else [] for tokens, some in lists]
        with self.trainer.compute_loss_context_manager():
            prompts, layout = [tokens.prompt for tokens, _ in lists], self.trainer.layout
            loss = self.trainer.loss
            more: dict[str, Any] = {"tokens": loss.needs_tokens, "beyond": Beyond(loss.needs_squares)}
            rows = list_logps(self.model, prompts, responses, layout=layout, unlearned=spans, **more)
        values = torch.cat([row[: len(some)] for row, some in zip(rows, responses, strict=True)])
        if not loss.needs_tokens:
            return values
        missing = max(n for e in part for n in e.tokens.lengths) - values.shape[1]  # to the longest of all chunks
        return pad(values, [0, 0] * (values.dim() - 2) + [0, missing])

    def _slopes(self, part: Part, logps: Tensor) -> tuple[Tensor, Tensor]:
        """(P, N) gradient of the loss by the log-probs, and the loss."""
        logps.requires_grad_()
        loss = self.trainer.share(self.trainer.losses_of(logps, part, self.trainer.meter_of(part)), part, self.prompts)
        (slopes,) = torch.autograd.grad(loss, logps)
        return slopes, loss.detach()

    def _second_pass(self, part: Part, chunk: list[Candidate], slopes: Tensor) -> Tensor:
        values = self._values(part, chunk)
        self._backward((values * slopes[_places(chunk, slopes.device)]).sum())
        return values.new_zeros(())

    def _idle(self) -> Tensor:
        """A forward of next to nothing, which counts for nothing."""
        with self.trainer.compute_loss_context_manager():
            return self.trainer.values(self.model, [self.spare]).sum() * 0.0

    def _idle_backward(self) -> Tensor:
        nothing = self._idle()
        self._backward(nothing)
        return nothing.detach()

    def _backward(self, loss: Tensor) -> None:
        accelerator = self.trainer.accelerator
        # The loss is a mean over the update already; DeepSpeed would divide it by the micro-batches once more.
        more = {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        accelerator.backward(loss, **more)


def _places(chunk: list[Candidate], device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tensor(chunk, device=device).unbind(1)
    return rows, columns


def _prompt_of(candidate: Candidate) -> int:
    return candidate[0]
