"""Backward over lists that do not fit in memory: log-probs first, then each part again with its own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.head import head_of, label_logps
from rankalign.logps import (
    ATTENTION_FAMILIES,
    TOLERANCE,
    causal_lm,
    hidden_states,
    inside,
    list_logps,
    precision,
    supports_tree,
)
from rankalign.tree import Lists, Prefix, Tokens, branch_row, tree_row, tree_tokens

Candidate = tuple[int, int]  # prompt, response
Unit = list[list[Candidate]]  # chunks; where there are several, they are of one prompt


def backward_two_pass(
    model: nn.Module,
    prompts: Sequence[Tokens],
    responses: Lists,
    loss_fn: Callable[[Tensor], Tensor],
    token_budget: int,
    *,
    layout: str = "auto",
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """Backward of a loss over whole lists with the memory of a prompt and one chunk, however long the lists are.

    The first pass computes log-probs without gradients; the loss gives its slope in each of them; the second pass runs
    every chunk again and sends the slopes back, which adds up to the gradient of the whole loss:
    d loss / d theta = sum_n (d loss / d logp_n) (d logp_n / d theta). Responses with a slope of exactly zero are not
    run again. Where a list is split, its prompt runs once a pass, and its backward once, after those of its responses.

    Args:
        model: as in :func:`rankalign.logps.list_logps`. Dropout must be off: the passes would draw different masks.
        prompts: P prompts as token ids.
        responses: for each prompt its responses as token ids.
        loss_fn: from (P, N) log-probs to a scalar.
        token_budget: tokens a chunk may hold, its prompt included; at least one response is run at a time.
        layout: as in :func:`rankalign.logps.list_logps`.
        backward: how to run a chunk's backward, for trainers that scale losses in a way of their own.

    Returns:
        The loss and the (P, N) log-probs, both detached.

    Raises:
        InputError: the passes disagree on a log-prob.
    """
    task = _Task(model, prompts, responses, token_budget, layout)
    everything = [(p, n) for p, candidates in enumerate(responses) for n in range(len(candidates))]
    logps = task.first_pass(everything)
    loss = loss_fn(logps.requires_grad_())
    (slopes,) = torch.autograd.grad(loss, logps)
    active = [(p, n) for p, n in everything if slopes[p, n] != 0]
    with getattr(model, "no_sync", nullcontext)():
        for chunk, again in task.run(active):
            task.check_equal(chunk, again.detach(), logps.detach()[_index(chunk)])
            backward((again * slopes[_index(chunk)]).sum())
    if hasattr(model, "no_sync"):  # ranks have different chunks; they meet once, in a backward that adds nothing
        backward(list_logps(model, prompts[:1], [responses[0][:1]], layout=layout).sum() * 0.0)
    return loss.detach(), logps.detach()


@dataclass(frozen=True)
class _Task:
    model: nn.Module
    prompts: Sequence[Tokens]
    responses: Lists
    token_budget: int
    layout: str

    @torch.no_grad()
    def first_pass(self, candidates: list[Candidate]) -> Tensor:
        """(P, N) log-probs."""
        parts = list(self.run(candidates))
        flat = torch.cat([values for _, values in parts])
        logps = flat.new_zeros(len(self.prompts), max(map(len, self.responses)))
        logps[_index(list(chain.from_iterable(chunk for chunk, _ in parts)))] = flat
        return logps

    def run(self, candidates: list[Candidate]) -> Iterator[tuple[list[Candidate], Tensor]]:
        """Chunks and their (candidates,) log-probs. With gradients on, run each one's backward before the next."""
        tree = supports_tree(self.model) if self.layout == "auto" else self.layout == "tree"
        for unit in units(self.prompts, self.responses, candidates, self.token_budget, tree):
            if len(unit) > 1 and tree and _can_keep_prefix(self.model):
                yield from self._run_branches(unit)
            else:
                yield from ((chunk, self._run_lists(chunk)) for chunk in unit)

    def _run_lists(self, chunk: list[Candidate]) -> Tensor:
        lists = [(p, [n for _, n in group]) for p, group in groupby(chunk, key=_prompt_of)]
        some = [[self.responses[p][n] for n in numbers] for p, numbers in lists]
        logps = list_logps(self.model, [self.prompts[p] for p, _ in lists], some, layout=self.layout)
        return logps[_index([(row, i) for row, (_, numbers) in enumerate(lists) for i in range(len(numbers))])]

    def _run_branches(self, unit: Unit) -> Iterator[tuple[list[Candidate], Tensor]]:
        """Chunks of one prompt, which is run once; its own backward follows those of all chunks."""
        prompt = self.prompts[unit[0][0][0]]
        prefix = _run_prompt(self.model, prompt)
        leaf = prefix.leaf() if torch.is_grad_enabled() else prefix
        for chunk in unit:
            yield chunk, _branch_logps(self.model, leaf, len(prompt), [self.responses[p][n] for p, n in chunk])
        ends = [(t, end.grad) for t, end in zip(prefix.tensors(), leaf.tensors(), strict=True) if end.grad is not None]
        if ends:
            torch.autograd.backward([t for t, _ in ends], [grad for _, grad in ends])

    def check_equal(self, chunk: list[Candidate], again: Tensor, before: Tensor) -> None:
        """Refuse to go on with gradients of another model than the loss has seen."""
        tokens = torch.tensor([len(self.responses[p][n]) for p, n in chunk], device=again.device)
        if not bool(((again - before).abs() <= TOLERANCE[precision(self.model)] * (tokens + 1)).all()):
            raise InputError("the two passes of the backward disagree on log-probs; is dropout still on?")


def units(
    prompts: Sequence[Tokens], responses: Lists, candidates: Iterable[Candidate], token_budget: int, tree: bool
) -> Iterator[Unit]:
    """Group candidates, in order: lists that fit in the budget together share a chunk, those too long for it are split.

    Args:
        prompts: as in :func:`backward_two_pass`.
        responses: as in :func:`backward_two_pass`.
        candidates: (prompt, response) pairs, sorted.
        token_budget: tokens of a chunk.
        tree: whether a prompt is written once for all its responses in a chunk, or padded with every one.
    """
    cost = _tree_cost if tree else _padded_cost
    together: list[Candidate] = []
    for _, group in groupby(candidates, key=_prompt_of):
        own = list(group)
        if together and cost(prompts, responses, together + own) > token_budget:
            yield [together]
            together = []
        if cost(prompts, responses, own) > token_budget:
            yield list(_split(own, lambda chunk: cost(prompts, responses, chunk) <= token_budget))
        else:
            together = together + own
    if together:
        yield [together]


def _split(candidates: list[Candidate], fits: Callable[[list[Candidate]], bool]) -> Iterator[list[Candidate]]:
    chunk: list[Candidate] = []
    for candidate in candidates:
        if chunk and not fits([*chunk, candidate]):
            yield chunk
            chunk = []
        chunk.append(candidate)
    yield chunk


def _prompt_of(candidate: Candidate) -> int:
    return candidate[0]


def _tree_cost(prompts: Sequence[Tokens], responses: Lists, chunk: list[Candidate]) -> int:
    trees = groupby(chunk, key=_prompt_of)
    return sum(tree_tokens(len(prompts[p]), [len(responses[p][n]) for _, n in group]) for p, group in trees)


def _padded_cost(prompts: Sequence[Tokens], responses: Lists, chunk: list[Candidate]) -> int:
    return len(chunk) * max(len(prompts[p]) + len(responses[p][n]) for p, n in chunk)


def _index(candidates: list[Candidate]) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tensor(candidates).unbind(1)
    return rows, columns


# --- a prompt on its own, and responses after it -----------------------------------------------------------------


def _can_keep_prefix(model: nn.Module) -> bool:
    """Whether attention can store a prompt's keys: not with a mask for trees, nor where backward runs layers again."""
    again = any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return not again and causal_lm(model).config.model_type in ATTENTION_FAMILIES


def _run_prompt(model: nn.Module, prompt: Tokens) -> Prefix:
    """Run a prompt alone and keep what its responses need."""
    lm, prefix = causal_lm(model), Prefix()
    rows = tree_row([prompt], [[]], record=prefix)
    prefix.end = inside(model, lambda: hidden_states(lm, rows, lm.device))[0, -1:]
    return prefix


def _branch_logps(model: nn.Module, prefix: Prefix, prompt_length: int, responses: Sequence[Tokens]) -> Tensor:
    """(responses,) log-probs of responses to a prompt that has been run."""
    lm = causal_lm(model)
    rows = branch_row(prompt_length, responses, prefix)
    sizes = torch.tensor([len(r) for r in responses], device=lm.device)

    def compute() -> Tensor:
        states = [prefix.end] if prefix.end is not None else []
        if rows.ids.numel():
            states.append(hidden_states(lm, rows, lm.device)[0])
        flat = label_logps(head_of(lm), torch.cat(states)[rows.predictors.to(lm.device)], rows.labels.to(lm.device))
        owner = torch.repeat_interleave(torch.arange(len(responses), device=lm.device), sizes)
        return flat.new_zeros(len(responses)).index_add(0, owner, flat)

    return inside(model, compute)
