"""Attention along trees on a GPU in a fixed number of kernels, whatever the number of prompts and responses.

The row holds all prompts and then all responses. Each prompt is causal on itself, each response is causal on itself,
and all responses of a prompt, as one block of queries, see all of it. So one ragged flash call takes the first two,
another the third, on slices of the same tensors: nothing is copied. Their log-sum-exps join them, and backward hands
the joint output and log-sum-exp to both, which makes the probabilities those of the whole. A layer with a sliding
window takes one call over keys gathered along each path instead.

The calls are ``aten::_flash_attention_forward`` and ``_backward`` with ``cum_seq_q``: FlashAttention 2 (Dao 2023) in
torch's own wheels, 3 or 4 where :func:`choose_flash` was asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from rankalign.errors import InputError
from rankalign.rows.sinks import join_sinks, sink_slopes
from rankalign.rows.tree import Forest, Span
from rankalign.rows.upload import to_device


@dataclass(frozen=True)
class Segments:
    """Ragged sequences one behind the other.

    Attributes:
        starts: (sequences + 1,) int32, where each begins and the last ends.
        longest: an upper bound of their lengths.
    """

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """From lengths, which may be 0; on the host.

        The bound is at least 2: at 1 the kernel takes the query heads of a group for queries, and needs as many queries
        as sequences.
        """
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(2, *lengths))


@dataclass(eq=False)
class Ragged:
    """A row with its prompts first, as ragged sequences.

    Attributes:
        own: every prompt and every response that has tokens in the row, as queries and as keys.
        answers: all responses of each prompt together, as queries.
        question: every prompt, as keys.
        asked: how many of the keys are prompts.
        left_out: how many of these are not in the row, because their prompt has been run before.
        runs: of each sequence of ``own``, the prompt it follows (None for a prompt) and its keys.
        reached: row positions that a gradient reaches and the row they make on their own, kept for the next layer.
    """

    own: Segments
    answers: Segments
    question: Segments
    asked: int
    left_out: int
    runs: list[tuple[Span | None, Span]]
    reached: tuple[Tensor, Ragged] | None = None
    _windows: dict[int, tuple[Tensor, Segments]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, trees: Sequence[tuple[Span, Sequence[Span]]], left_out: int) -> Ragged:
        """On the host, from the spans of prompts and responses; ``left_out`` is 0 or the length of the one prompt."""
        prompts = [prompt for prompt, _ in trees]
        runs: list[tuple[Span | None, Span]] = [] if left_out else [(None, prompt) for prompt in prompts]
        runs += [(prompt, (a, b)) for prompt, responses in trees for a, b in responses if b > a]
        return cls(
            own=Segments.of([b - a for _, (a, b) in runs]),
            answers=Segments.of([sum(b - a for a, b in responses) for _, responses in trees]),
            question=Segments.of([b - a for a, b in prompts]),
            asked=sum(b - a for a, b in prompts),
            left_out=left_out,
            runs=runs,
        )

    def send(self, device: torch.device, *more: Tensor) -> list[Tensor]:
        """Move to a device; what else is to go there goes along, in the same copy, and is returned."""
        windows = list(self._windows.items())
        segments = [self.own, self.answers, self.question, *(keys for _, (_, keys) in windows)]
        held = [*(some.starts for some in segments), *(index for _, (index, _) in windows)]
        sent = to_device(device, *more, *held)
        starts = iter(sent[len(more) :])
        self.own, self.answers, self.question, *keys = (replace(some, starts=next(starts)) for some in segments)
        self._windows = {window: (next(starts), own) for (window, _), own in zip(windows, keys, strict=True)}
        return sent[: len(more)]

    def paths(self, window: int) -> tuple[Tensor, Segments]:
        """For a layer in which a token sees ``window`` tokens of its path: the keys of each sequence of ``own``.

        Before those of a response stand the last ``window - 1`` of its prompt, all that its first token sees.

        Returns:
            (keys,) int64 positions among the keys, and how they divide.
        """
        if window not in self._windows:
            keys = [_path(prompt, own, window) for prompt, own in self.runs]
            segments = Segments.of([len(some) for some in keys])
            index = torch.tensor([i for some in keys for i in some], dtype=torch.long)
            index, starts = to_device(self.own.starts.device, index, segments.starts)
            self._windows[window] = index, replace(segments, starts=starts)
        return self._windows[window]


def _path(prompt: Span | None, own: Span, window: int) -> list[int]:
    before = range(max(prompt[0], prompt[1] - window + 1), prompt[1]) if prompt else ()
    return [*before, *range(*own)]


VERSIONS = {"fa2": ("", 256), "fa3": ("FA3", 256), "fa4": ("FA4", 128)}  # torch's name, widest head
_SOURCES = {
    "fa3": "the folder hopper/ of github.com/Dao-AILab/flash-attention, by `python setup.py install`",
    "fa4": "pip install flash-attn-4",
}
_CARDS = {"fa3": {9: "Hopper (H100, H200)"}, "fa4": {9: "Hopper (H100, H200)", 10: "Blackwell (B200)"}}
_active = "fa2"


def choose_flash(version: str, on_gpu: bool) -> None:
    """Take FlashAttention 2 (torch's own), 3 or 4 for all calls from now on.

    Args:
        version: a name in VERSIONS.
        on_gpu: whether models run on one.

    Raises:
        InputError: this one is not here, or not for this card.
    """
    global _active
    name, _ = VERSIONS[version]
    if not name:
        if _active != version:
            restore_flash_attention_impl()
        _active = version
        return
    asked, cards = f"--flash_attention {version}", _CARDS[version]
    if not on_gpu:
        raise InputError(f"{asked} runs on GPUs alone: leave it out")
    major, minor = torch.cuda.get_device_capability()
    if major not in cards:
        kinds = " or ".join(cards.values())
        raise InputError(f"{asked} needs {kinds}; this card has compute capability {major}.{minor}: leave it out")
    try:
        activate_flash_attention_impl(name)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{asked} is not installed ({error}): {_SOURCES[version]}") from error
    _active = version


def takes_ragged(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these: 16 bits on a GPU of Ampere or newer, a size of heads they are compiled for."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    dim, most = query.shape[-1], VERSIONS[_active][1]
    if most < dim <= VERSIONS["fa2"][1]:  # by a mask it would be slower than with the version that was passed over
        raise InputError(
            f"--flash_attention {_active} takes heads of up to {most}, and these are of {dim}: leave it out"
        )
    known = dim == key.shape[-1] == value.shape[-1] and dim % 8 == 0 and dim <= most
    return known and (query.dtype in (torch.bfloat16, torch.float16) or ANY_TYPE)


# Tests in float64 lift what the kernels are compiled for, on a device that can.
ANY_TYPE = False


def prepare(
    forest: Forest, device: torch.device, windows: Sequence[int] = (), more: Sequence[Tensor] = ()
) -> tuple[Ragged | None, list[Tensor]]:
    """Put the row on the device, once for all layers.

    Args:
        forest: the trees of the row.
        device: where the row is wanted.
        windows: sliding windows of the model's layers, so that no layer has to upload anything.
        more: what else is to go there, in the same copy.

    Returns:
        The row, None where its prompts do not stand first; and ``more`` on the device.
    """
    if not (forest.prompts_first or len(forest.trees) == 1):
        return None, to_device(device, *more)
    if forest.ragged is not None:
        return forest.ragged, to_device(device, *more)
    row = Ragged.of([(tree.prompt, tree.responses) for tree in forest.trees], forest.offset)
    for window in windows:
        if any(tree.depth > window for tree in forest.trees):
            row.paths(window)
    sent = row.send(device, *more)
    forest.ragged = row
    return row, sent


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(1, tokens, heads, dim) attention of every token to its path.

    Args:
        query: (1, heads, tokens, dim), 16 bits, on a GPU.
        key: (1, key heads, tokens, dim), where key heads divides heads; a prompt that is not in the row in front.
        value: like ``key``.
        forest: the trees of the row, prompts first.
        scaling: factor on the scores.
        window: how many tokens of its path a token sees, itself included; None for all.
        sinks: (heads,) score of each head's sink, where it has one.
    """
    row, _ = prepare(forest, query.device)
    assert row is not None  # rows for a GPU are made with their prompts first
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if window is not None:
        return _windowed(q, k, v, sinks, row, scaling, window)[None]
    return _joined(q, k, v, sinks, row, forest, scaling)[None]


def _flash(
    q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool, scale: float, window: int = -1
) -> tuple[Tensor, Tensor]:
    """(tokens, heads, dim) attention within ragged sequences, aligned at their ends; (heads, tokens) log-sum-exps."""
    at = (queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal, False)
    sides: dict[str, Any] = {"window_size_left": window, "window_size_right": 0} if window >= 0 else {}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *at, scale=scale, **sides)
    return out, lse


def _flash_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    queries: Segments,
    keys: Segments,
    causal: bool,
    scale: float,
    window: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. The kernel takes log-sum-exps for dense and does not look."""
    at = (queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal)
    state = (torch.empty(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device))
    sides: dict[str, Any] = {"window_size_left": window, "window_size_right": 0} if window >= 0 else {}
    call: Any = torch.ops.aten._flash_attention_backward
    grads: tuple[Tensor, Tensor, Tensor] = call(
        grad.contiguous(), *inputs, out, lse.contiguous(), *at, *state, scale=scale, **sides
    )
    return grads


class _Joined(torch.autograd.Function):
    """Two calls, each on slices."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, row: Ragged, forest: Forest, scale: float
    ) -> Tensor:
        out, lse = _flash(q, k[row.left_out :], v[row.left_out :], row.own, row.own, True, scale)
        at = row.asked - row.left_out
        if at < len(q):
            more, more_lse = _flash(q[at:], k[: row.asked], v[: row.asked], row.answers, row.question, False, scale)
            _join(out[at:], lse[:, at:], more, more_lse)
        out, lse = _beside(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.row, ctx.forest, ctx.scale = row, forest, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        of_sinks = _of_sinks(grad, out, lse, sinks)
        rows = ctx.forest.active_rows(grad.device) if ctx.forest.prefix is None else None
        if rows is None:
            found = _joined_backward(grad, (q, k, v), out, lse, ctx.row, ctx.scale)
            return *found, of_sinks, None, None, None
        if ctx.row.reached is None or ctx.row.reached[0] is not rows:
            ctx.row.reached = rows, Ragged.of(_closed_up(ctx.forest.active_spans()), 0)
            ctx.row.reached[1].send(grad.device)
        size = len(grad)
        grad, q, k, v, out = (t.index_select(0, rows) for t in (grad, q, k, v, out))
        found = _joined_backward(grad, (q, k, v), out, lse[:, rows], ctx.row.reached[1], ctx.scale)
        whole = (t.new_zeros(size, *t.shape[1:]).index_copy_(0, rows, t) for t in found)
        return *whole, of_sinks, None, None, None


def _closed_up(trees: list[tuple[Span, list[Span]]]) -> list[tuple[Span, list[Span]]]:
    """The same trees in a row without gaps, prompts first."""
    lengths = [b - a for (a, b), _ in trees] + [b - a for _, responses in trees for a, b in responses]
    ends = list(accumulate(lengths, initial=0))
    spans = list(pairwise(ends))
    responses = iter(spans[len(trees) :])
    return [(prompt, [next(responses) for _ in own]) for prompt, (_, own) in zip(spans, trees, strict=False)]


def _joined_backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, row: Ragged, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs
    own = (q, k[row.left_out :], v[row.left_out :])
    dq, dk, dv = _flash_backward(grad, own, out, lse, row.own, row.own, True, scale)
    if row.left_out:
        dk, dv = (torch.cat([t.new_zeros(row.left_out, *t.shape[1:]), t]) for t in (dk, dv))
    at = row.asked - row.left_out
    if at < len(q):
        part = (q[at:], k[: row.asked], v[: row.asked])
        more = _flash_backward(grad[at:], part, out[at:], lse[:, at:], row.answers, row.question, False, scale)
        dq[at:] += more[0]
        dk[: row.asked] += more[1]
        dv[: row.asked] += more[2]
    return dq, dk, dv


def _join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge attention to further keys into attention to some, in place; rounded once."""
    joint = torch.logaddexp(lse, more_lse)
    share, more_share = ((part - joint).exp_().t()[..., None] for part in (lse, more_lse))
    out.copy_(torch.addcmul(out * share, more, more_share))
    lse.copy_(joint)


def _beside(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tokens, heads, dim) output and (heads, tokens) log-sum-exps with the heads' sinks among the scores."""
    if sinks is None:
        return out, lse
    joint, share = join_sinks(lse, sinks[:, None])
    return (out * share.t()[..., None]).to(out.dtype), joint


def _of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """(heads,) gradient of the sinks."""
    return None if sinks is None else sink_slopes(grad, out, lse.t(), sinks).sum(0).to(sinks.dtype)


class _Windowed(torch.autograd.Function):
    """One call over keys gathered along each path."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, row: Ragged, scale: float, window: int
    ) -> Tensor:
        index, keys = row.paths(window)
        out, lse = _flash(q, k[index], v[index], row.own, keys, True, scale, window - 1)
        out, lse = _beside(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.row, ctx.scale, ctx.window = row, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        index, keys = ctx.row.paths(ctx.window)
        inputs = (q, k[index], v[index])
        dq, *rest = _flash_backward(grad, inputs, out, lse, ctx.row.own, keys, True, ctx.scale, ctx.window - 1)
        wide = torch.promote_types(k.dtype, torch.float32)  # a prompt's keys add up over its responses
        dk, dv = (k.new_zeros(k.shape, dtype=wide).index_add_(0, index, t.to(wide)).to(k.dtype) for t in rest)
        return dq, dk, dv, _of_sinks(grad, out, lse, sinks), None, None, None


_joined: Callable[..., Tensor] = _Joined.apply
_windowed: Callable[..., Tensor] = _Windowed.apply
