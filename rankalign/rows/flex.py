"""Attention along trees with soft-capped scores on a GPU, by FlexAttention: neither scores nor mask are ever whole.

FlashAttention's kernels in torch know no soft-cap. FlexAttention (Dong et al. 2024, https://arxiv.org/abs/2412.05496)
compiles one that has it, and visits only blocks of the score matrix in which anything is seen. Which these are follows
from the trees: along its path a token sees one run of its prompt and one of its own segment. So four numbers a token
are the whole mask, for any window, and the kernel is compiled once for rows of all shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, overrides
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as _flex_attention

from rankalign.rows.tree import Forest

BLOCK = 128  # queries and keys of a block: what the kernels of torch are tuned for
LEAST_DIM = 16  # of a head, which products on tensor cores start at


def takes_flex(query: Tensor) -> bool:
    """Whether the kernel is worth it and can be had: 16 bits on a GPU of Ampere or newer, heads of 16 and more."""
    if type(query) is not Tensor or not query.is_cuda or query.shape[-1] < LEAST_DIM:
        return False  # fake tensors (a plan) have no kernel to compile
    known = query.dtype in (torch.bfloat16, torch.float16) or ANY_TYPE
    return known and torch.cuda.get_device_capability(query.device) >= (8, 0)


# Tests in float64 lift what the kernel is for.
ANY_TYPE = False


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float, softcap: float, window: int | None = None
) -> Tensor:
    """(1, tokens, heads, dim) attention of every token to its path, its scores ``softcap * tanh(score / softcap)``.

    Args:
        query: (1, heads, tokens, dim), on a GPU.
        key: (1, key heads, tokens, dim), where key heads divides heads; a prompt that is not in the row in front.
        value: like ``key``.
        forest: the trees of the row.
        scaling: factor on the scores.
        softcap: their cap.
        window: how many tokens of its path a token sees, itself included; None for all.
    """
    mask = prepare(forest, query.device, window)
    # Modes around it (recipes, linear layers) are for what Python sees; the compiler would take them in. Scale and cap
    # are constants of a model, and as symbols, which dynamic shapes make of numbers, the kernel refuses them.
    with _without_modes(), torch._dynamo.config.patch(specialize_float=True):
        out: Tensor = _compiled()(
            query, key, value, score_mod=_capped(softcap), block_mask=mask, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous()


@contextmanager
def _without_modes() -> Iterator[None]:
    """No mode of Python's around the operations in this context."""
    stack: Any = overrides
    modes = [stack._pop_mode() for _ in range(stack._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            stack._push_mode(mode)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Where torch has no CUDA there is nothing to generate code with.
    backend = "inductor" if torch.version.cuda else _as_written
    return torch.compile(_flex_attention, fullgraph=True, dynamic=True, backend=backend)


def _as_written(graph: Any, inputs: Any) -> Callable[..., Any]:
    """The traced graph by plain operations; the compiler is kept from what these do inside."""

    def run(*args: Any) -> Any:
        # It differentiates the cap at every call, whose own saved tensors checkpointing would take for the layer's.
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            return graph(*args)

    disable: Any = torch.compiler.disable
    kept: Callable[..., Any] = disable(run)
    return kept


@functools.cache  # one function a cap, or each call would be a program of its own
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def prepare(forest: Forest, device: torch.device, window: int | None) -> BlockMask:
    """What each token of the row sees, put on the device once for all layers of a window."""
    if window not in forest.blocks:
        forest.blocks[window] = block_mask(forest, window, device)
    found: BlockMask = forest.blocks[window]
    return found


def block_mask(forest: Forest, window: int | None, device: torch.device) -> BlockMask:
    """The blocks of (queries, keys) in which nothing, something and everything is seen.

    A block that is seen whole is not asked for its mask again, so only whole ones may be called so: counted exactly.
    """
    seen = visible(forest, window)
    keys = int(seen[3].max())
    starts = torch.arange(0, keys, BLOCK)
    # (tokens, key blocks): how many keys of each block fall into either run.
    ends = torch.minimum(seen[1::2, :, None], starts + BLOCK)
    counts = (ends - torch.maximum(seen[::2, :, None], starts)).clamp(min=0).sum(0)
    rows = torch.nn.functional.pad(counts, (0, 0, 0, -len(counts) % BLOCK))
    blocks = rows.view(-1, BLOCK, len(starts)).sum(1)
    whole = blocks == BLOCK * BLOCK
    a, b, c, d = seen.int().to(device, non_blocking=True)

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        return ((key >= a[query]) & (key < b[query])) | ((key >= c[query]) & (key < d[query]))

    mask = BlockMask.from_kv_blocks(
        *_listed((blocks > 0) & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(seen.shape[1], keys),
    )
    return mask.to(device)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, query blocks) int32 counts of the marked key blocks, and (1, 1, query blocks, key blocks) these first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def visible(forest: Forest, window: int | None) -> Tensor:
    """(4, tokens) int64: the keys that each token of the row sees, as two half-open runs, of its prompt and of itself.

    The first is empty for a token of a prompt. Keys count a prompt that is not in the row.
    """
    runs = torch.zeros(4, forest.size + forest.offset, dtype=torch.long)
    for tree in forest.trees:
        start, end = tree.prompt
        for a, b in (tree.prompt, *tree.responses):
            at = torch.arange(a, b)
            own = torch.full_like(at, a) if window is None else (at - window + 1).clamp(min=a)
            runs[2, a:b], runs[3, a:b] = own, at + 1
            if a != start:
                # The path of the n-th token of a response (from 0) is the prompt and n + 1 tokens of its own.
                left = torch.full_like(at, start) if window is None else (end - window + 1 + at - a).clamp(start, end)
                runs[0, a:b], runs[1, a:b] = left, end
    return runs[:, forest.offset :]
