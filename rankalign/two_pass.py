"""Backward over lists that do not fit in memory: log-probs first, then each part again with its own gradient."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.head import head_of, label_logps
from rankalign.logps import (
    ATTENTION_FAMILIES,
    TOLERANCE,
    causal_lm,
    check_request,
    hidden_states,
    inside,
    label_states,
    lay_out,
    list_logps,
    precision,
    sum_responses,
    supports_tree,
)
from rankalign.recompute import runs_layers_again
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

    The first pass keeps the hidden states that predict response tokens, and no graph. From them the head, the loss and
    their backward give the gradient of every such state. The second pass runs every chunk again and sends its states'
    gradients down, which adds up to the gradient of the whole loss. Responses whose gradient is exactly zero are not
    run again. Where a list is split, its prompt runs once a pass, and its backward once, after those of its responses.

    Args:
        model: as in :func:`rankalign.logps.list_logps`. Dropout must be off: the passes would draw different masks.
        prompts: P prompts as token ids.
        responses: for each prompt its responses as token ids.
        loss_fn: from (P, N) log-probs to a scalar.
        token_budget: tokens a chunk may hold, its prompt included; at least one response is run at a time.
        layout: as in :func:`rankalign.logps.list_logps`.
        backward: what to call with the loss instead of ``loss.backward()``; whatever it scales the loss by scales all.

    Returns:
        The loss and the (P, N) log-probs, both detached.

    Raises:
        InputError: the passes disagree on hidden states.
        ValueError: no response has a token.
    """
    check_request(causal_lm(model), prompts, layout)
    task = _Task(model, prompts, responses, token_budget, layout)
    everything = [(p, n) for p, candidates in enumerate(responses) for n, r in enumerate(candidates) if len(r)]
    if not everything:
        raise ValueError("no response has a token")
    with torch.no_grad():
        states = torch.cat([some for _, some in task.run(everything)]).requires_grad_()
    with getattr(model, "no_sync", nullcontext)():
        logps = task.logps(states)
        loss = loss_fn(logps)
        backward(loss)
        slopes = task.by_candidate(everything, _or_zero(states.grad, states))
        before = task.by_candidate(everything, states.detach())
        for chunk, again in task.run([candidate for candidate in everything if bool(slopes[candidate].any())]):
            _check_equal(again.detach(), torch.cat([before[candidate] for candidate in chunk]), precision(model))
            torch.autograd.backward(again, torch.cat([slopes[candidate] for candidate in chunk]))
            _trim_heap()
    if hasattr(model, "no_sync"):  # ranks have different chunks; they meet once, in a backward that adds nothing
        torch.autograd.backward(list_logps(model, prompts[:1], [responses[0][:1]], layout=layout).sum() * 0.0)
    return loss.detach(), logps.detach()


@dataclass(frozen=True)
class _Task:
    model: nn.Module
    prompts: Sequence[Tokens]
    responses: Lists
    token_budget: int
    layout: str

    def logps(self, states: Tensor) -> Tensor:
        """(P, N) log-probs from the (all response tokens, hidden) states that predict them."""
        labels = torch.tensor([token for row in self.responses for r in row for token in r], device=states.device)
        head = head_of(causal_lm(self.model))
        return sum_responses(label_logps(head, states, labels), self.responses)

    def by_candidate(self, candidates: list[Candidate], values: Tensor) -> dict[Candidate, Tensor]:
        """Rows of (all response tokens, ...) values by candidate."""
        sizes = [len(self.responses[p][n]) for p, n in candidates]
        return dict(zip(candidates, torch.split(values, sizes), strict=True))

    def run(self, candidates: list[Candidate]) -> Iterator[tuple[list[Candidate], Tensor]]:
        """Chunks and the states that predict their tokens; with gradients on, backward must run before the next."""
        tree = supports_tree(self.model) if self.layout == "auto" else self.layout == "tree"
        for unit in units(self.prompts, self.responses, candidates, self.token_budget, tree):
            if len(unit) > 1 and tree and _can_keep_prefix(self.model):
                yield from self._run_branches(unit)
            else:
                yield from ((chunk, self._run_lists(chunk)) for chunk in unit)

    def _run_lists(self, chunk: list[Candidate]) -> Tensor:
        lists = [(p, [self.responses[p][n] for _, n in group]) for p, group in groupby(chunk, key=_prompt_of)]
        lm = causal_lm(self.model)
        rows = lay_out(lm, [self.prompts[p] for p, _ in lists], [some for _, some in lists], self.layout)
        assert rows is not None  # candidates without tokens are no candidates
        return inside(self.model, lambda: label_states(lm, rows))

    def _run_branches(self, unit: Unit) -> Iterator[tuple[list[Candidate], Tensor]]:
        """Chunks of one prompt, which is run once; its own backward follows those of all chunks.

        Tokens are embedded once as well: the gradient of the embedding matrix is the largest there is.
        """
        lm, prompt = causal_lm(self.model), self.prompts[unit[0][0][0]]
        parts = [[self.responses[p][n] for p, n in chunk] for chunk in unit]
        prefix = self._run_prompt(prompt, [token for part in parts for r in part for token in r[:-1]])
        leaf = prefix.leaf() if torch.is_grad_enabled() else prefix
        start = 0
        for chunk, part in zip(unit, parts, strict=True):
            rows = branch_row(len(prompt), part, leaf)
            stop = start + rows.ids.numel()
            embeddings = None if leaf.embeddings is None else leaf.embeddings[:, start:stop]
            yield chunk, inside(self.model, partial(label_states, lm, rows, embeddings))
            start = stop
        ends = [(end, cut.grad) for end, cut in zip(prefix.tensors(), leaf.tensors(), strict=True) if end.requires_grad]
        if ends:
            torch.autograd.backward([end for end, _ in ends], [_or_zero(grad, end) for end, grad in ends])

    def _run_prompt(self, prompt: Tokens, rest: list[int]) -> Prefix:
        """Run a prompt and look up the tokens that follow it."""
        lm, prefix = causal_lm(self.model), Prefix()
        row = tree_row([prompt], [[]], record=prefix)
        tokens = torch.tensor([[*prompt, *rest]], device=lm.device)

        def compute() -> tuple[Tensor, Tensor]:
            embeddings = lm.get_input_embeddings()(tokens)
            return hidden_states(lm, row, embeddings[:, : len(prompt)])[0, -1:], embeddings[:, len(prompt) :]

        prefix.end, prefix.embeddings = inside(self.model, compute)
        return prefix


def _trim_heap() -> None:
    """Hand freed memory back: glibc keeps blocks of up to 32 MB, and the next chunk does not fit into their holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _check_equal(again: Tensor, before: Tensor, dtype: torch.dtype) -> None:
    """Refuse to go on with gradients of another model than the loss has seen."""
    if not bool((again - before).norm() <= 10 * TOLERANCE[dtype] * before.norm()):
        raise InputError("the two passes of the backward disagree on hidden states; is dropout still on?")


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
    return len(chunk) * max(len(prompts[p]) + len(responses[p][n]) - 1 for p, n in chunk)


def _can_keep_prefix(model: nn.Module) -> bool:
    """Whether attention can store a prompt's keys: not with a mask for trees, nor where backward runs layers again."""
    return not runs_layers_again(model) and causal_lm(model).config.model_type in ATTENTION_FAMILIES
