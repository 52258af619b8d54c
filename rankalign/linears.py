"""Linear layers of a model in the way training needs them: on the fastest kernel, and backward on active rows alone.

Nothing but a response itself attends to its tokens, so where the loss is flat in a response's log-prob (hinge-type
losses on lists that are in order), the gradients of its tokens are exactly zero in every layer. Linear layers, where
the time goes, then multiply the other rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from rankalign import gemm
from rankalign.recompute import out_of_reach, rows_alone
from rankalign.tree import Forest


@contextmanager
def fast_linears(model: nn.Module, forest: Forest | None) -> Iterator[None]:
    """Linear layers that run in this context, and their recomputations under gradient checkpointing, are ours.

    Args:
        model: the transformers model that runs.
        forest: the row that runs, whose ``active`` is read when backward runs; None where every row counts.
    """
    if any(map(out_of_reach, model.modules())) or (forest is None and not gemm.faster()):
        yield
        return
    layers: list[Any] = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
    layers = [layer for layer in layers if hasattr(layer, "_gradient_checkpointing_func")]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, functions, strict=True):
        layer._gradient_checkpointing_func = _checkpoint_within(checkpoint, forest)
    try:
        with _Linears(forest):
            yield
    finally:
        for layer, checkpoint in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = checkpoint


def _checkpoint_within(checkpoint: Callable[..., Any], forest: Forest | None) -> Callable[..., Any]:
    """The checkpoint function, with the recomputed function inside the mode."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def within(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with _Linears(forest):
                return function(*inner_args, **inner_kwargs)

        return checkpoint(within, *args, **kwargs)

    return run


class _Linears(TorchFunctionMode):
    """Linear layers become :class:`_Linear`."""

    def __init__(self, forest: Forest | None) -> None:
        super().__init__()
        self.forest = forest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs and _is_plain(args[1]):
            return self._run(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and _is_plain(args[2]):  # the Conv1D of GPT-2
            return self._run(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        whole = self.forest is not None and x.numel() == self.forest.size * x.shape[-1]
        return _linear(x, weight, bias, self.forest if whole else None)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is neither quantised nor distributed."""
    return type(weight) in (Tensor, nn.Parameter)


class _Linear(torch.autograd.Function):
    """y = x W^T + b whose backward, and forward when recomputed, run over the rows that a gradient reaches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forest: Forest | None) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.forest, ctx.shape, ctx.types = forest, x.shape, (x.dtype, weight.dtype)
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, weight, bias)
        rows = _active_rows(forest, x)
        return _to_rows(gemm.linear(_take_rows(x, rows), weight, bias), rows, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = _active_rows(ctx.forest, grad)
        with rows_alone():
            x, weight = ctx.saved_tensors
        g = _take_rows(grad, rows)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _to_rows(gemm.linear(g, weight.t().to(g.dtype)).to(ctx.types[0]), rows, ctx.shape)
        if ctx.needs_input_grad[1]:
            taken = rows is not None and x.shape[:-1].numel() == len(rows)  # rows are always fewer than all
            grad_weight = gemm.linear(g.t(), _take_rows(x, None if taken else rows).t().to(g.dtype)).to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            grad_bias = g.sum(0).to(ctx.types[1])
        return grad_x, grad_weight, grad_bias, None


_linear: Callable[..., Tensor] = _Linear.apply


def _active_rows(forest: Forest | None, x: Tensor) -> Tensor | None:
    return None if forest is None else forest.active_rows(x.device)


def _take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """(rows, last dimension) of ``x``; all of them for None."""
    return x.flatten(0, -2) if rows is None else x.flatten(0, -2)[rows]


def _to_rows(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """The values in their rows of a tensor with these leading dimensions, zero elsewhere."""
    shape = torch.Size([*shape[:-1], values.shape[-1]])
    if rows is None:
        return values.view(shape)
    full = values.new_zeros(shape)
    full.view(-1, values.shape[-1])[rows] = values
    return full
