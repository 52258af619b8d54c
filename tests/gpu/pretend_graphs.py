"""CUDA graphs of the pretended device: what is captured is not done, and what is replayed is done on the same memory.

As on a real card, while a graph is captured nothing may wait for the device or come from the host; what it is to write
keeps what it held before, and what is made in it holds nothing that can be read, until the graph is replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


@dataclass
class Call:
    """One operation: the CPU's, on tensors of the CPU that share the device's memory, and what came of it."""

    op: Any
    args: Any
    kwargs: Any
    out: list[torch.Tensor]


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    capturing: Graph | None = None
    replays = 0
    captures = 0
    on_replay: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Call] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.whole = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if Graph.capturing is not None:
            raise RuntimeError("another graph is being captured")
        Graph.capturing = self

    def capture_end(self) -> None:
        Graph.capturing = None
        for tensor, held in reversed(self.before):
            tensor.copy_(held)
        for call in self.calls:
            for made in call.out:
                made.fill_(torch.nan if made.is_floating_point() else True)
        self.before, self.whole = [], True
        Graph.captures += 1

    def replay(self) -> None:
        if not self.whole:
            raise RuntimeError("a graph that was not captured cannot be replayed")
        Graph.replays += 1
        Graph.on_replay()
        for call in self.calls:
            again = [leaf for leaf in tree_leaves(call.op(*call.args, **call.kwargs)) if isinstance(leaf, torch.Tensor)]
            fresh = [made for made in again if not _shares(made, _tensors(call))]
            for made, new in zip(call.out, fresh, strict=True):
                made.copy_(new)

    def reset(self) -> None:
        self.calls, self.whole = [], False


def run(op: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of the CPU, or an emulation, on its tensors, and note it where a graph is being captured."""
    graph = Graph.capturing
    if graph is None:
        return op(*args, **kwargs)
    arguments = op._schema.arguments if hasattr(op, "_schema") else ()  # an emulation writes to none of its own
    named = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named:
            written = [t for t in tree_leaves(named[argument.name]) if isinstance(t, torch.Tensor) and t.numel()]
            graph.before += [(tensor, tensor.clone()) for tensor in written]
    out = op(*args, **kwargs)
    call = Call(op, args, kwargs, [])
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    call.out = [tensor for tensor in made if not _shares(tensor, _tensors(call))]
    graph.calls.append(call)
    return out


def _tensors(call: Call) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]


def _shares(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    for other in others:
        start = other.untyped_storage().data_ptr()
        if tensor.numel() and start <= tensor.data_ptr() < start + other.untyped_storage().nbytes():
            return True
    return False


class Waits:
    """What the host does when it waits for the device: under ``set_sync_debug_mode`` it says so."""

    mode = 0

    @classmethod
    def set(cls, mode: int | str) -> None:
        cls.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode) if isinstance(mode, str) else mode

    @classmethod
    def note(cls) -> None:
        if Graph.capturing is not None:
            raise RuntimeError(NOT_PERMITTED)
        if cls.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if cls.mode == 1:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


def put_in(cuda: Any) -> None:
    """Put graphs and the debug mode into ``torch.cuda``."""
    cuda.CUDAGraph = Graph
    cuda.is_current_stream_capturing = lambda: Graph.capturing is not None
    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = Waits.set, lambda: Waits.mode
