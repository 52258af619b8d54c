"""Tree rows: a prompt is written once and every response branches off its end; nothing is padded.

A row is ``[prompt | r1 | ... | rN]``, several of these one after the other, or, for kernels that take ragged sequences,
all prompts and then all responses. Positions of a response continue from its prompt, and it attends to its prompt and
to itself, so its log-probs are those of ``[prompt | response]`` on its own. The last token of a response is predicted
and predicts nothing, so it is no part of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.rows.upload import to_device

Tokens = Sequence[int]
Lists = Sequence[Sequence[Tokens]]  # the responses of each prompt
Span = tuple[int, int]


def tree_tokens(prompt_length: int, response_lengths: Sequence[int]) -> int:
    """How many tokens a prompt and its responses take in a tree row."""
    return prompt_length + sum(map(_run_length, response_lengths))


def _run_length(response_length: int) -> int:
    return max(response_length - 1, 0)


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its responses lie in a row, as half-open spans of row positions.

    Attributes:
        prompt: span of the prompt, never empty.
        responses: spans of the responses less their last tokens, back to back, behind the prompt or further on.
        labels: how many tokens of each response are predicted, the last included.
    """

    prompt: Span
    responses: tuple[Span, ...]
    labels: tuple[int, ...]

    @classmethod
    def at(cls, start: int, prompt_length: int, response_lengths: Sequence[int], behind: int | None = None) -> Tree:
        """The tree whose prompt begins at row position ``start``, its responses at ``behind`` or right at its end."""
        end = start + prompt_length
        ends = list(accumulate(map(_run_length, response_lengths), initial=end if behind is None else behind))
        return cls((start, end), tuple(pairwise(ends)), tuple(response_lengths))

    def predictors(self) -> list[int]:
        """Row positions whose hidden states predict the labels: the shift of labels is here and nowhere else."""
        last = self.prompt[1] - 1
        pairs = zip(self.responses, self.labels, strict=True)
        return [position for span, count in pairs if count for position in (last, *range(*span))]

    @property
    def pieces(self) -> list[Span]:
        """The whole tree, in one span or two."""
        return merged([self.prompt, *self.responses])

    @property
    def depth(self) -> int:
        """Tokens on the longest path from the root to a leaf."""
        longest = max((stop - start for start, stop in self.responses), default=0)
        return self.prompt[1] - self.prompt[0] + longest

    def positions(self) -> Tensor:
        """(tokens,) int64: distance of each token from the root, along its path."""
        size = self.prompt[1] - self.prompt[0]
        return torch.cat([torch.arange(size)] + [torch.arange(size, size + b - a) for a, b in self.responses])

    def branches(self) -> Tensor:
        """(tokens,) int64: 0 for the prompt, n for a token of the n-th response."""
        lengths = torch.tensor([b - a for a, b in (self.prompt, *self.responses)])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def mask(self, window: int | None = None) -> Tensor:
        """(tokens, tokens) bool: True where the query (row) attends to the key (column).

        Args:
            window: a token sees this many tokens of its path, itself included; None for all of them.
        """
        position, branch = self.positions(), self.branches()
        distance = position[:, None] - position[None, :]
        visible = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
        return visible & (distance >= 0) & (distance < (window or len(position)))


@dataclass(eq=False)
class Prefix:
    """A prompt that has been run: all that its responses need of it.

    Attributes:
        cache: keys and values of every attention layer, (1, key heads, tokens, dim) each.
        end: (1, hidden) last hidden state of the last token, which predicts the first token of every response.
    """

    cache: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    end: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Everything it holds."""
        pairs = [t for pair in self.cache.values() for t in pair]
        return pairs if self.end is None else [*pairs, self.end]

    def leaf(self) -> Prefix:
        """A copy cut off from the graph that made it, collecting gradients of its own."""
        cache = {layer: (cut(key), cut(value)) for layer, (key, value) in self.cache.items()}
        return Prefix(cache, None if self.end is None else cut(self.end))


def cut(tensor: Tensor) -> Tensor:
    """A copy that collects a gradient of its own."""
    return tensor.detach().clone().requires_grad_()


@dataclass(eq=False)
class Forest:
    """The trees of a row: what attention needs to know of it.

    Attributes:
        trees: in row order, covering the row.
        prefix: where the row leaves its one prompt out, what attention needs of it; spans still count the prompt.
        record: where attention is to store the keys and values of the row's one prompt.
        prompts_first: whether all prompts stand before all responses.
        active: per tree and response, whether any gradient reaches it; None while unknown. Set during the backward
            pass by the LM head and read by everything below it.
        ragged: the row as :mod:`rankalign.rows.flash_varlen` takes it, made when a layer first asks.
        blocks: by sliding window, the row as :mod:`rankalign.rows.flex` takes it, likewise.
        attended: how many layers have attended along the trees.
    """

    trees: tuple[Tree, ...]
    prefix: Prefix | None = None
    record: Prefix | None = None
    prompts_first: bool = False
    active: list[list[bool]] | None = None
    ragged: Any = None
    blocks: dict[int | None, Any] = field(default_factory=dict)
    attended: int = 0
    _masks: dict[tuple[int, int | None, torch.device], Tensor] = field(default_factory=dict, repr=False)
    _rows: Tensor | None = field(default=None, repr=False)

    @cached_property  # asked at every operation of a layer
    def size(self) -> int:
        """Tokens of the row."""
        return max(tree.pieces[-1][1] for tree in self.trees) - self.offset

    @property
    def offset(self) -> int:
        """How many positions that the spans count stand before the row: those of a prompt that is left out."""
        return self.trees[0].prompt[1] if self.prefix else 0

    def queries(self, span: Span) -> slice:
        """Where the tokens of a span, less those of a prompt that is left out, lie in the row."""
        return slice(max(span[0] - self.offset, 0), span[1] - self.offset)

    def note_gradient(self, grad: Tensor) -> None:
        """Learn from the (labels,) gradient of the row's log-probs which responses are active."""
        lengths = [count for tree in self.trees for count in tree.labels]
        nonzero = iter(bool(part.any()) for part in torch.split(grad.cpu(), lengths))
        self.active = [[next(nonzero) for _ in tree.responses] for tree in self.trees]
        self._rows = None

    def active_spans(self) -> list[tuple[Span, list[Span]]]:
        """Prompt and responses of every tree that a gradient reaches; all of them while nothing is known."""
        everywhere = [[True] * len(tree.responses) for tree in self.trees]
        pairs = zip(self.trees, self.active or everywhere, strict=True)
        return [
            (tree.prompt, [(a, b) for (a, b), on in zip(tree.responses, row, strict=True) if on and b > a])
            for tree, row in pairs
            if self.active is None or any(row)
        ]

    def active_rows(self, device: torch.device) -> Tensor | None:
        """(active tokens,) int64 row positions that a gradient reaches, or None for all of them."""
        if self.active is None:
            return None
        if self._rows is None:
            spans = merged(sorted(span for prompt, responses in self.active_spans() for span in (prompt, *responses)))
            places = torch.tensor([i for span in spans for i in range(*span)], dtype=torch.long)
            (self._rows,) = to_device(device, places)
        return None if len(self._rows) == self.size else self._rows

    def mask(self, index: int, window: int | None, device: torch.device) -> Tensor:
        """The mask of one tree, kept for the next layer that asks."""
        key = (index, window, device)
        if key not in self._masks:
            self._masks[key] = self.trees[index].mask(window).to(device)
        return self._masks[key]

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, 1, tokens, tokens) additive mask of the whole row, for models that only take a mask."""
        bias = torch.full((1, 1, self.size, self.size), torch.finfo(dtype).min, dtype=dtype, device=device)
        for i, tree in enumerate(self.trees):
            at = torch.tensor([row for span in tree.pieces for row in range(*span)], device=device)
            own = torch.full((len(at), len(at)), torch.finfo(dtype).min, dtype=dtype, device=device)
            bias[0, 0, at[:, None], at] = own.masked_fill_(self.mask(i, None, device), 0.0)
        return bias


@dataclass(frozen=True)
class Rows:
    """Token ids laid out for a model, and which of its hidden states predict what.

    Attributes:
        ids: (rows, tokens) int64.
        positions: (rows, tokens) int64.
        forest: the trees of the one row; None for padded rows.
        predictors: (labels,) int64, index into the flattened (rows * tokens) hidden states.
        labels: (labels,) int64, the response tokens, list after list.
        lengths: of padded rows, how many tokens of each are no padding.
    """

    ids: Tensor
    positions: Tensor
    forest: Forest | None
    predictors: Tensor
    labels: Tensor
    lengths: tuple[int, ...] = ()


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same positions in as few spans as possible; the spans must be in order."""
    out: list[Span] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            start = out.pop()[0]
        out.append((start, stop))
    return out


def tree_row(
    prompts: Sequence[Tokens], responses: Lists, record: Prefix | None = None, prompts_first: bool = False
) -> Rows:
    """All lists in one row, each prompt written once; ``record`` and ``prompts_first`` are those of :class:`Forest`."""
    lengths = [[len(r) for r in candidates] for candidates in responses]
    behind = sum(map(len, prompts)) if prompts_first else None
    trees: list[Tree] = []
    at = 0
    for prompt, own in zip(prompts, lengths, strict=True):
        trees.append(Tree.at(at, len(prompt), own, behind))
        run = sum(map(_run_length, own))
        at, behind = (at + len(prompt) + run, None) if behind is None else (at + len(prompt), behind + run)
    size = max(tree.pieces[-1][1] for tree in trees)
    ids, positions = torch.empty(size, dtype=torch.long), torch.empty(size, dtype=torch.long)
    for tree, prompt, candidates in zip(trees, prompts, responses, strict=True):
        flat = torch.tensor([*prompt, *(token for r in candidates for token in r[:-1])])
        for to, some in ((ids, flat), (positions, tree.positions())):
            for (a, b), part in zip(tree.pieces, torch.split(some, [b - a for a, b in tree.pieces]), strict=True):
                to[a:b] = part
    return Rows(
        ids=ids[None],
        positions=positions[None],
        forest=Forest(tuple(trees), record=record, prompts_first=prompts_first),
        predictors=torch.tensor([p for tree in trees for p in tree.predictors()], dtype=torch.long),
        labels=_labels(responses),
    )


def branch_row(prompt_length: int, responses: Sequence[Tokens], prefix: Prefix) -> Rows:
    """The responses of one prompt that has been run before; predictors count its last hidden state as number 0."""
    tree = Tree.at(0, prompt_length, [len(r) for r in responses])
    return Rows(
        ids=torch.tensor([[token for r in responses for token in r[:-1]]], dtype=torch.long),
        positions=tree.positions()[None, prompt_length:],
        forest=Forest((tree,), prefix),
        predictors=torch.tensor(tree.predictors(), dtype=torch.long) - (prompt_length - 1),
        labels=_labels([responses]),
    )


def padded_rows(prompts: Sequence[Tokens], responses: Lists) -> Rows:
    """Each response in a row of its own, ``[prompt | response]``, padded on the right.

    A causal model cannot see what stands to the right, so the padding needs no mask.
    """
    pairs = [(p, r) for p, candidates in zip(prompts, responses, strict=True) for r in candidates]
    rows = [[*p, *r[:-1]] for p, r in pairs]
    width = max(map(len, rows))
    trees = [Tree.at(i * width, len(p), [len(r)]) for i, (p, r) in enumerate(pairs)]
    return Rows(
        ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        positions=torch.arange(width).expand(len(rows), width),
        forest=None,
        predictors=torch.tensor([p for tree in trees for p in tree.predictors()], dtype=torch.long),
        labels=_labels(responses),
        lengths=tuple(map(len, rows)),
    )


def _labels(responses: Lists) -> Tensor:
    return torch.tensor([token for candidates in responses for r in candidates for token in r], dtype=torch.long)
