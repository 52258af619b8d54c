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
from rankalign.rows.checks import Checks
from rankalign.rows.head import head_of
from rankalign.rows.logps import (
    TOLERANCE,
    Spans,
    causal_lm,
    check_request,
    hidden_states,
    in_lists,
    inside,
    label_states,
    lay_out,
    list_logps,
    on_device,
    precision,
    supports_tree,
)
from rankalign.rows.recipes import layers_run_again
from rankalign.rows.tree import Forest, Lists, Prefix, Rows, Tokens, branch_row, cut, tree_row, tree_tokens
from rankalign.rows.upload import to_device
from rankalign.rows.verdict import verdict_of
from rankalign.rows.whole import NOTHING, Beyond, Reference, label_values

# Share of a hidden state that rounding in 16 bits may change: deep models lose a few hundredths, dropout a third.
MOST_ROUNDING = 0.1

Candidate = tuple[int, int]  # prompt, response
Unit = list[list[Candidate]]  # chunks; where there are several, they are of one prompt
Ends = list[tuple[Tensor, Tensor]]  # tensors of a graph, each with its gradient
Again = tuple[list[Candidate], Tensor, Ends]  # a chunk, the states that predict its tokens, what goes down with them


def backward_two_pass(
    model: nn.Module,
    prompts: Sequence[Tokens],
    responses: Lists,
    loss_fn: Callable[[Tensor], Tensor],
    token_budget: int,
    *,
    layout: str = "auto",
    backward: Callable[[Tensor], Any] = Tensor.backward,
    unlearned: Spans = (),
    checks: Checks | None = None,
    tokens: bool = False,
    beyond: Beyond = NOTHING,
) -> tuple[Tensor, Tensor]:
    """Backward of a loss over whole lists with the memory of a prompt and one chunk, however long the lists are.

    The first pass keeps the hidden states that predict response tokens, and the graph of its last chunk alone. From
    them the head, the loss and their backward give the gradient of every such state. The second pass sends the last
    chunk's gradients down its graph, then runs every other chunk again and sends down its own, which adds up to the
    gradient of the whole loss. Responses whose gradient is exactly zero are not run again. Where a list is split, its
    prompt runs once a pass, and its backward once, after those of its responses.

    Args:
        model: as in :func:`rankalign.rows.logps.list_logps`. Dropout must be off: the passes would draw other masks.
        prompts: P prompts as token ids.
        responses: for each prompt its responses as token ids.
        loss_fn: from (P, N) log-probs to a scalar, with ``tokens`` from (P, N, T).
        token_budget: tokens a chunk may hold, its prompt included; at least one response is run at a time.
        layout: as in :func:`rankalign.rows.logps.list_logps`.
        backward: what to call with the loss instead of ``loss.backward()``; whatever it scales the loss by scales all.
        unlearned: as in :func:`rankalign.rows.logps.list_logps`.
        checks: takes what has to hold, for the caller to settle; None settles it here.
        tokens: as in :func:`rankalign.rows.logps.list_logps`.
        beyond: as there; a reference as :func:`reference_in_chunks` gives it.

    Returns:
        The loss and the log-probs that it read, both detached.

    Raises:
        InputError: the passes disagree on hidden states.
        ValueError: no response has a token.
    """
    agreement = checks or Checks()
    check_request(causal_lm(model), prompts, layout)
    task = _Task(model, prompts, responses, token_budget, layout, unlearned, tokens, beyond)
    everything = [(p, n) for p, candidates in enumerate(responses) for n, r in enumerate(candidates) if len(r)]
    if not everything:
        raise ValueError("no response has a token")
    with getattr(model, "no_sync", nullcontext)():
        done, last = task.first_pass(everything)
        states = torch.cat([*done, last.states.detach()]).requires_grad_()
        logps = task.logps(states)
        loss = loss_fn(logps)
        backward(loss)
        slope = _or_zero(states.grad, states)
        slopes = task.by_candidate(everything, slope)
        before = task.by_candidate(everything, states.detach())
        reached = task.by_candidate(everything, slope.any(1).cpu())  # the one wait for the device
        last.backward(*(torch.cat([some[candidate] for candidate in last.chunk]) for some in (slopes, reached)))
        _trim_heap()
        others = everything[: -len(last.chunk)]
        for chunk, again, ends in task.second_pass([c for c in others if bool(reached[c].any())], last):
            if chunk:
                first = torch.cat([before[candidate] for candidate in chunk])
                agreement.require(_agree(again.detach(), first, precision(model)), _disagreement)
                ends = [(again, torch.cat([slopes[candidate] for candidate in chunk])), *ends]
            _send_down(ends)
            _trim_heap()
    if checks is None:
        agreement.settle()
    if hasattr(model, "no_sync"):  # ranks have different chunks; they meet once, in a backward that adds nothing
        torch.autograd.backward(list_logps(model, prompts[:1], [responses[0][:1]], layout=layout).sum() * 0.0)
    return loss.detach(), logps.detach()


@torch.no_grad()
def reference_in_chunks(
    model: nn.Module, prompts: Sequence[Tokens], responses: Lists, token_budget: int, layout: str = "auto"
) -> Reference:
    """:func:`rankalign.rows.logps.reference_at` of lists that do not fit in memory; arguments as there and above."""
    task = _Task(model, prompts, responses, token_budget, layout)
    done, last = task.first_pass([(p, n) for p, row in enumerate(responses) for n, r in enumerate(row) if len(r)])
    return Reference(head_of(causal_lm(model)), torch.cat([*done, last.states]))


@dataclass
class _Last:
    """The last chunk of the first pass.

    Attributes:
        chunk: its candidates.
        states: what predicts their tokens, with the graph that made them.
        prefix: where the chunk is a part of a list, its prompt, cut off from the graph that made it.
        embeddings: of its input tokens then, cut off as well.
        forest: the trees of the row, where the chunk is one of whole lists.
    """

    chunk: list[Candidate]
    states: Tensor
    prefix: Prefix | None = None
    embeddings: Tensor | None = None
    forest: Forest | None = None

    def backward(self, slopes: Tensor, reached: Tensor) -> None:
        """Send the gradient of the states down, if there is any, and let go of their graph.

        Args:
            slopes: (labels, hidden) the gradient.
            reached: (labels,) bool on the host, where it is not zero.
        """
        if self.forest is not None:
            self.forest.note_gradient(reached)
        if reached.any():
            torch.autograd.backward(self.states, slopes)
        self.states = self.states.detach()


@dataclass(frozen=True)
class _Task:
    model: nn.Module
    prompts: Sequence[Tokens]
    responses: Lists
    token_budget: int
    layout: str
    unlearned: Spans = ()
    tokens: bool = False
    beyond: Beyond = NOTHING

    def logps(self, states: Tensor) -> Tensor:
        """(P, N) log-probs, or (P, N, T), from the (all response tokens, hidden) states that predict them."""
        tokens = torch.tensor([token for row in self.responses for r in row for token in r])
        (labels,) = to_device(states.device, tokens)
        head = head_of(causal_lm(self.model))
        values = label_values(head, states, labels, self.beyond)
        return in_lists(values, self.responses, self.unlearned, self.tokens)

    def by_candidate(self, candidates: list[Candidate], values: Tensor) -> dict[Candidate, Tensor]:
        """Rows of (all response tokens, ...) values by candidate."""
        sizes = [len(self.responses[p][n]) for p, n in candidates]
        return dict(zip(candidates, torch.split(values, sizes), strict=True))

    def first_pass(self, candidates: list[Candidate]) -> tuple[list[Tensor], _Last]:
        """The states of all chunks but the last, without a graph, and the last."""
        *earlier, unit = self._units(candidates)
        *before, chunk = unit
        done = [states for some in earlier for states in self._read(some)]
        if not self._branches(unit):
            rows = self._rows(chunk)
            return done + self._read_lists(before), _Last(chunk, self._run_rows(rows), forest=rows.forest)
        states, prefix = self._read_branches(before)
        embeddings = cut(self._embed(self._inputs(chunk)))
        return done + states, _Last(chunk, self._run_branch(chunk, prefix, embeddings), prefix, embeddings)

    def second_pass(self, candidates: list[Candidate], last: _Last) -> Iterator[Again]:
        """Chunks, the states that predict their tokens, and what goes down with them; backward runs before the next."""
        prompt = _prompt_of(last.chunk[0]) if last.prefix is not None else None
        for unit in self._units([c for c in candidates if _prompt_of(c) != prompt]):
            if self._branches(unit):
                with torch.no_grad():
                    prefix = self._run_with_prompt(self.prompts[_prompt_of(unit[0][0])])[1].leaf()
                yield from self._run_again(unit, prefix)
            else:
                yield from ((chunk, self._run_rows(self._rows(chunk)), []) for chunk in unit)
        if last.prefix is not None:
            own = self._units([c for c in candidates if _prompt_of(c) == prompt])
            yield from self._run_again([chunk for unit in own for chunk in unit], last.prefix, last)

    def _units(self, candidates: list[Candidate]) -> list[Unit]:
        return list(units(self.prompts, self.responses, candidates, self.token_budget, self._tree))

    @property
    def _tree(self) -> bool:
        return supports_tree(self.model) if self.layout == "auto" else self.layout == "tree"

    def _branches(self, unit: Unit) -> bool:
        """Whether the chunks of a unit share the run of their prompt."""
        return len(unit) > 1 and self._tree and _can_keep_prefix(self.model)

    def _read(self, unit: Unit) -> list[Tensor]:
        return self._read_branches(unit)[0] if self._branches(unit) else self._read_lists(unit)

    @torch.no_grad()
    def _read_lists(self, unit: Unit) -> list[Tensor]:
        return [self._run_rows(self._rows(chunk)) for chunk in unit]

    @torch.no_grad()
    def _read_branches(self, unit: Unit) -> tuple[list[Tensor], Prefix]:
        """States of the chunks, and what responses need of their prompt."""
        first, *others = unit
        states, prefix = self._run_with_prompt(self.prompts[_prompt_of(first[0])], first)
        leaf = prefix.leaf()
        return [states, *(self._run_branch(chunk, leaf) for chunk in others)], leaf

    def _run_rows(self, rows: Rows) -> Tensor:
        return inside(self.model, lambda: label_states(causal_lm(self.model), rows))

    def _rows(self, chunk: list[Candidate]) -> Rows:
        lists = [(p, [self.responses[p][n] for _, n in group]) for p, group in groupby(chunk, key=_prompt_of)]
        prompts, responses = [self.prompts[p] for p, _ in lists], [some for _, some in lists]
        rows = lay_out(causal_lm(self.model), prompts, responses, self.layout)
        assert rows is not None  # candidates without tokens are no candidates
        return rows

    def _run_again(self, unit: Unit, prefix: Prefix, last: _Last | None = None) -> Iterator[Again]:
        """Chunks of one prompt, as in :meth:`second_pass`. The first runs in one row with the prompt, after the others:
        what they send to the prompt goes down with it, and the weights take in one gradient for both.

        Tokens are embedded together as well: the gradient of the embedding matrix is the largest there is.

        Args:
            unit: the chunks; without any the prompt runs alone.
            prefix: the prompt, cut off from the graph that made it.
            last: one more chunk of the prompt, whose backward is done.
        """
        done = last.chunk if last else []
        if not unit and all(t.grad is None for t in prefix.tensors()):
            return
        first, others = (unit[0], unit[1:]) if unit else ([], [])
        prompt = self.prompts[_prompt_of((done or first)[0])]
        spans = [[*prompt, *self._inputs(first)], *map(self._inputs, others), self._inputs(done)]
        embeddings = self._embed([token for span in spans for token in span])
        leaf = cut(embeddings)
        parts = torch.split(leaf, [len(span) for span in spans], 1)
        for chunk, part in zip(others, parts[1:], strict=False):
            yield chunk, self._run_branch(chunk, prefix, part), []
        states, joint = self._run_with_prompt(prompt, first, parts[0])
        slopes = [_or_zero(t.grad, t) for t in prefix.tensors()]
        yield first, states, list(zip(joint.tensors(), slopes, strict=True))
        slope = _or_zero(leaf.grad, leaf)
        if last is not None and last.embeddings is not None and last.embeddings.grad is not None:
            slope[:, len(slope[0]) - len(spans[-1]) :] = last.embeddings.grad
        yield [], states, [(embeddings, slope)]

    def _inputs(self, chunk: Sequence[Candidate]) -> list[int]:
        """The tokens of its responses that a row holds."""
        return [token for p, n in chunk for token in self.responses[p][n][:-1]]

    def _run_branch(self, chunk: list[Candidate], prefix: Prefix, embeddings: Tensor | None = None) -> Tensor:
        prompt = self.prompts[_prompt_of(chunk[0])]
        rows = branch_row(len(prompt), [self.responses[p][n] for p, n in chunk], prefix)
        return inside(self.model, partial(label_states, causal_lm(self.model), rows, embeddings))

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """(1, tokens, hidden)."""
        lm = causal_lm(self.model)
        (ids,) = to_device(lm.device, torch.tensor([tokens], dtype=torch.long))
        return inside(self.model, lambda: lm.get_input_embeddings()(ids))

    def _run_with_prompt(
        self, prompt: Tokens, chunk: Sequence[Candidate] = (), embeddings: Tensor | None = None
    ) -> tuple[Tensor, Prefix]:
        """Run a prompt with some of its responses: the states that predict their tokens, and the prompt."""
        lm, prefix = causal_lm(self.model), Prefix()
        rows = on_device(lm, tree_row([prompt], [[self.responses[p][n] for p, n in chunk]], record=prefix))

        def compute() -> tuple[Tensor, Tensor]:
            states = hidden_states(lm, rows, embeddings)[0]
            return states.index_select(0, rows.predictors), states[len(prompt) - 1 : len(prompt)]

        states, prefix.end = inside(self.model, compute)
        return states, prefix


def _send_down(ends: Ends) -> None:
    """Backward from several tensors of a graph at once, those that have one."""
    wanted = [(end, slope) for end, slope in ends if end.requires_grad]
    if wanted:
        torch.autograd.backward([end for end, _ in wanted], [slope for _, slope in wanted])


def _trim_heap() -> None:
    """Hand freed memory back: glibc keeps blocks of up to 32 MB, and the next chunk does not fit into their holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _agree(again: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """(1,) whether two runs gave the same hidden states, up to rounding."""
    most = min(10 * TOLERANCE[dtype], MOST_ROUNDING)
    return ((again - before).norm() <= most * before.norm())[None]


def _disagreement(fine: Sequence[bool]) -> InputError:
    """What to say where gradients are of another model than the loss has seen."""
    return InputError("the two passes of the backward disagree on hidden states; is dropout still on?")


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
    return not layers_run_again(model) and verdict_of(causal_lm(model)).keeps_prefix
