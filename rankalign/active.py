"""Backward that leaves out responses no gradient reaches (hinge-type losses on lists that are already in order).

Nothing but a response itself attends to its tokens, so where the loss is flat in a response's log-prob, the gradients
of its tokens are exactly zero in every layer. Linear layers, where the time goes, then multiply the other rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from rankalign.tree import Forest


@contextmanager
def active_backward(model: nn.Module, forest: Forest) -> Iterator[None]:
    """Forward passes in this context get a backward that skips inactive responses; so do their recomputations.

    Args:
        model: the transformers model that runs; gradient checkpointing of its layers is taken care of.
        forest: the row that runs; ``forest.active`` is read when backward runs.
    """
    layers: list[Any] = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
    layers = [layer for layer in layers if hasattr(layer, "_gradient_checkpointing_func")]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    if any(hasattr(m, "checkpoint_fn") for m in model.modules()):  # torch's own wrapper recomputes out of our reach
        yield
        return
    for layer, checkpoint in zip(layers, functions, strict=True):
        layer._gradient_checkpointing_func = _checkpoint_within(checkpoint, forest)
    try:
        with _ActiveLinears(forest):
            yield
    finally:
        for layer, checkpoint in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = checkpoint


def _checkpoint_within(checkpoint: Callable[..., Any], forest: Forest) -> Callable[..., Any]:
    """The checkpoint function, with the recomputed function inside the mode."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def within(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with _ActiveLinears(forest):
                return function(*inner_args, **inner_kwargs)

        return checkpoint(within, *args, **kwargs)

    return run


class _ActiveLinears(TorchFunctionMode):
    """Linear layers over the tokens of a tree row become :class:`_ActiveLinear`."""

    def __init__(self, forest: Forest) -> None:
        super().__init__()
        self.forest = forest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs and self._fits(args[0], args[1]):
            return _active_linear(args[0], args[1], args[2] if len(args) > 2 else None, self.forest)
        if func is torch.addmm and not kwargs and self._fits(args[1], args[2]):  # the Conv1D of GPT-2
            return _active_linear(args[1], args[2].t(), args[0], self.forest)
        return func(*args, **(kwargs or {}))

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        plain = type(weight) in (Tensor, nn.Parameter)  # no quantised or distributed tensors
        return plain and x.numel() == self.forest.size * x.shape[-1]


class _ActiveLinear(torch.autograd.Function):
    """y = x W^T + b whose backward, and forward when recomputed, run over the rows that a gradient reaches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forest: Forest) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.forest = forest
        rows = forest.active_rows(x.device)
        if rows is None:
            return linear(x, weight, bias)
        return _scatter(linear(x.flatten(0, -2)[rows], weight, bias), rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = ctx.forest.active_rows(grad.device)
        g, flat = grad.flatten(0, -2), x.flatten(0, -2)
        if rows is not None:
            g, flat = g[rows], flat[rows]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            part = (g @ weight.to(g.dtype)).to(x.dtype)
            grad_x = part.view_as(x) if rows is None else _scatter(part, rows, x)
        if ctx.needs_input_grad[1]:
            grad_weight = (g.t() @ flat.to(g.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = g.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


_active_linear: Callable[..., Tensor] = _ActiveLinear.apply


def _scatter(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The values in their rows of a tensor with the leading shape of ``like``, zero elsewhere."""
    full = values.new_zeros(*like.shape[:-1], values.shape[-1])
    full.view(-1, values.shape[-1])[rows] = values
    return full
