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
from rankalign.tree import Forest, Lists, Prefix, Rows, Tokens, branch_row, tree_row, tree_tokens

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

    The first pass keeps the hidden states that predict response tokens, and the graph of its last chunk alone. From
    them the head, the loss and their backward give the gradient of every such state. The second pass sends the last
    chunk's gradients down its graph, then runs every other chunk again and sends down its own, which adds up to the
    gradient of the whole loss. Responses whose gradient is exactly zero are not run again. Where a list is split, its
    prompt runs once a pass, and its backward once, after those of its responses.

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
    with getattr(model, "no_sync", nullcontext)():
        done, last = task.first_pass(everything)
        states = torch.cat([*done, last.states.detach()]).requires_grad_()
        logps = task.logps(states)
        loss = loss_fn(logps)
        backward(loss)
        slopes = task.by_candidate(everything, _or_zero(states.grad, states))
        before = task.by_candidate(everything, states.detach())
        last.backward(torch.cat([slopes[candidate] for candidate in last.chunk]))
        _trim_heap()
        others = everything[: -len(last.chunk)]
        for chunk, again in task.second_pass([c for c in others if bool(slopes[c].any())], last):
            _check_equal(again.detach(), torch.cat([before[candidate] for candidate in chunk]), precision(model))
            torch.autograd.backward(again, torch.cat([slopes[candidate] for candidate in chunk]))
            _trim_heap()
    if hasattr(model, "no_sync"):  # ranks have different chunks; they meet once, in a backward that adds nothing
        torch.autograd.backward(list_logps(model, prompts[:1], [responses[0][:1]], layout=layout).sum() * 0.0)
    return loss.detach(), logps.detach()


@dataclass
class _Last:
    """The last chunk of the first pass.

    Attributes:
        chunk: its candidates.
        states: what predicts their tokens, with the graph that made them.
        prefix: where the chunk is a part of a list, its prompt, cut off from the graph that made it, collecting
            gradients; its embeddings are those of the chunk.
        forest: the trees of the row, where the chunk is one of whole lists.
    """

    chunk: list[Candidate]
    states: Tensor
    prefix: Prefix | None = None
    forest: Forest | None = None

    def backward(self, slopes: Tensor) -> None:
        """Send the gradient of the states down, and let go of their graph."""
        if self.forest is not None:
            self.forest.note_gradient(slopes.any(1))
        torch.autograd.backward(self.states, slopes)
        self.states = self.states.detach()


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

    def first_pass(self, candidates: list[Candidate]) -> tuple[list[Tensor], _Last]:
        """The states of all chunks but the last, without a graph, and the last."""
        *earlier, unit = self._units(candidates)
        chunk = unit[-1]
        with torch.no_grad():
            done = [states for some in earlier for _, states in self._run(some)]
            if not self._branches(unit):
                done += [self._run_lists(some) for some in unit[:-1]]
            else:
                prefix = self._run_prompt(self.prompts[_prompt_of(chunk[0])], self._inputs(chunk))
                done += [self._run_branch(some, prefix) for some in unit[:-1]]
                leaf = prefix.leaf()
        if not self._branches(unit):
            rows = self._rows(chunk)
            return done, _Last(chunk, self._run_rows(rows), forest=rows.forest)
        return done, _Last(chunk, self._run_branch(chunk, leaf, leaf.embeddings), leaf)

    def second_pass(self, candidates: list[Candidate], last: _Last) -> Iterator[tuple[list[Candidate], Tensor]]:
        """Chunks and the states that predict their tokens; backward must run before the next."""
        prompt = _prompt_of(last.chunk[0]) if last.prefix is not None else None
        for unit in self._units([c for c in candidates if _prompt_of(c) != prompt]):
            yield from self._run(unit)
        if last.prefix is not None:
            own = [c for c in candidates if _prompt_of(c) == prompt]
            yield from self._run_branches(list(_split(own, self._fits)), last)

    def _units(self, candidates: list[Candidate]) -> list[Unit]:
        return list(units(self.prompts, self.responses, candidates, self.token_budget, self._tree))

    @property
    def _tree(self) -> bool:
        return supports_tree(self.model) if self.layout == "auto" else self.layout == "tree"

    def _fits(self, chunk: list[Candidate]) -> bool:
        return _tree_cost(self.prompts, self.responses, chunk) <= self.token_budget

    def _branches(self, unit: Unit) -> bool:
        """Whether the chunks of a unit share the run of their prompt."""
        return len(unit) > 1 and self._tree and _can_keep_prefix(self.model)

    def _run(self, unit: Unit) -> Iterator[tuple[list[Candidate], Tensor]]:
        if self._branches(unit):
            yield from self._run_branches(unit)
        else:
            yield from ((chunk, self._run_lists(chunk)) for chunk in unit)

    def _run_lists(self, chunk: list[Candidate]) -> Tensor:
        return self._run_rows(self._rows(chunk))

    def _run_rows(self, rows: Rows) -> Tensor:
        return inside(self.model, lambda: label_states(causal_lm(self.model), rows))

    def _rows(self, chunk: list[Candidate]) -> Rows:
        lists = [(p, [self.responses[p][n] for _, n in group]) for p, group in groupby(chunk, key=_prompt_of)]
        prompts, responses = [self.prompts[p] for p, _ in lists], [some for _, some in lists]
        rows = lay_out(causal_lm(self.model), prompts, responses, self.layout)
        assert rows is not None  # candidates without tokens are no candidates
        return rows

    def _run_branches(self, unit: Unit, last: _Last | None = None) -> Iterator[tuple[list[Candidate], Tensor]]:
        """Chunks of one prompt, which is run once; its own backward follows those of all chunks.

        Tokens are embedded once as well: the gradient of the embedding matrix is the largest there is.

        Args:
            unit: the chunks.
            last: one more chunk of the prompt, whose backward is done.
        """
        before = [last.chunk] if last else []
        tokens = [token for chunk in [*before, *unit] for token in self._inputs(chunk)]
        prefix = self._run_prompt(self.prompts[_prompt_of((before or unit)[0][0])], tokens)
        leaf = prefix.leaf() if torch.is_grad_enabled() else prefix
        start = sum(len(self._inputs(chunk)) for chunk in before)
        for chunk in unit:
            stop = start + len(self._inputs(chunk))
            embeddings = None if leaf.embeddings is None else leaf.embeddings[:, start:stop]
            yield chunk, self._run_branch(chunk, leaf, embeddings)
            start = stop
        ends = [(end, _or_zero(cut.grad, end)) for end, cut in zip(prefix.tensors(), leaf.tensors(), strict=True)]
        if last is not None and last.prefix is not None:
            for (_, slope), cut in zip(ends, last.prefix.tensors(), strict=True):
                if cut.grad is not None:
                    slope[:, : cut.shape[1]] += cut.grad  # its embeddings come first
        wanted = [(end, slope) for end, slope in ends if end.requires_grad]
        if wanted:
            torch.autograd.backward([end for end, _ in wanted], [slope for _, slope in wanted])

    def _inputs(self, chunk: list[Candidate]) -> list[int]:
        """The tokens of its responses that a row holds."""
        return [token for p, n in chunk for token in self.responses[p][n][:-1]]

    def _run_branch(self, chunk: list[Candidate], prefix: Prefix, embeddings: Tensor | None = None) -> Tensor:
        prompt = self.prompts[_prompt_of(chunk[0])]
        rows = branch_row(len(prompt), [self.responses[p][n] for p, n in chunk], prefix)
        return inside(self.model, partial(label_states, causal_lm(self.model), rows, embeddings))

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
