"""Linear layers of a model in the way training needs them: on the fastest kernel, and backward on active rows alone.

Nothing but a response itself attends to its tokens, so where the loss is flat in a response's log-prob (hinge-type
losses on lists that are in order), the gradients of its tokens are exactly zero in every layer. Linear layers, where
the time goes, then multiply the other rows alone, and so do products of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from rankalign.rows import gemm
from rankalign.rows.recipes import PLAIN, PRODUCTS, layers_run_again, out_of_reach, rows_alone
from rankalign.rows.tree import Forest


@contextmanager
def fast_linears(model: nn.Module, forest: Forest | None) -> Iterator[None]:
    """Linear layers that run in this context, and their recomputations under gradient checkpointing, are ours.

    Args:
        model: the transformers model that runs.
        forest: the row that runs, whose ``active`` is read when backward runs; None where every row counts.
    """
    weight = next(model.parameters(), None)
    on_cpu = weight is None or weight.device.type == "cpu"
    kernel = gemm.faster() and on_cpu
    if any(map(out_of_reach, model.modules())) or (forest is None and not kernel):
        yield
        return
    layers: list[Any] = [m for m in layers_run_again(model) if hasattr(m, "_gradient_checkpointing_func")]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, functions, strict=True):
        layer._gradient_checkpointing_func = _checkpoint_within(checkpoint, forest, on_cpu)
    try:
        with _Linears(forest, on_cpu):
            yield
    finally:
        for layer, checkpoint in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = checkpoint


def _checkpoint_within(checkpoint: Callable[..., Any], forest: Forest | None, on_cpu: bool) -> Callable[..., Any]:
    """The checkpoint function, with the recomputed function inside the mode."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def within(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with _Linears(forest, on_cpu):
                return function(*inner_args, **inner_kwargs)

        return checkpoint(within, *args, **kwargs)

    return run


class _Linears(TorchFunctionMode):
    """Linear layers become :class:`_Linear`, and on a CPU products of activations :class:`_Product`.

    A GPU takes as long to pick rows and put them back as to multiply all of them.
    """

    def __init__(self, forest: Forest | None, products: bool = True) -> None:
        super().__init__()
        self.forest, self.products = forest, products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs and _is_layer(*args):
            return self._run(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and _is_layer(args[1], args[2].t(), args[0]):  # the Conv1D of GPT-2
            return self._run(args[1], args[2].t(), args[0])
        if self.products and func in PRODUCTS and not kwargs and self._goes_by_row(*args):
            return _product(*args, self.forest)
        return func(*args, **(kwargs or {}))

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        whole = self.forest is not None and x.numel() == self.forest.size * x.shape[-1]
        return _linear(x, weight, bias, self.forest if whole else None)

    def _goes_by_row(self, a: Any, b: Any) -> bool:
        """Whether a * b multiplies an activation of the row by another, by a number a row, or by a number a column."""
        if self.forest is None or not (_is_plain(a) and _is_plain(b)) or a.dtype != b.dtype:
            return False
        rows, width = (1, self.forest.size), max((*a.shape[-1:], *b.shape[-1:]), default=0)
        shapes = ((*rows, width), (*rows, 1), (width,))
        return shapes[0] in (a.shape, b.shape) and a.shape in shapes and b.shape in shapes


def _is_layer(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether these are rows, a matrix and a number for each output, all of them plain."""
    if not all(map(_is_plain, (x, weight))) or (bias is not None and not _is_plain(bias)):
        return False
    return x.dim() > 1 and x.numel() > 0 and weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor, neither quantised nor distributed."""
    return type(tensor) in PLAIN


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


class _Product(torch.autograd.Function):
    """a * b whose backward runs over the rows that a gradient reaches."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, forest: Forest) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        ctx.forest, ctx.shapes = forest, (a.shape, b.shape)
        return a * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = _active_rows(ctx.forest, grad)
        with rows_alone():
            factors = ctx.saved_tensors[::-1]  # that of the gradient of a, and of b
        g = grad if rows is None else _take_rows(grad, rows)

        def gradient(factor: Tensor | None, shape: torch.Size) -> Tensor | None:
            if factor is None:
                return None
            if rows is None:
                return (g * factor).sum_to_size(shape)
            whole = factor.dim() > 1 and factor.shape[:-1].numel() > len(rows)
            values = g * (_take_rows(factor, rows) if whole else factor)
            return values.sum(0) if len(shape) == 1 else _to_rows(values.sum_to_size(len(rows), shape[-1]), rows, shape)

        return (*map(gradient, factors, ctx.shapes), None)


_product: Callable[..., Tensor] = _Product.apply


def _active_rows(forest: Forest | None, x: Tensor) -> Tensor | None:
    return None if forest is None else forest.active_rows(x.device)


def _take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """(rows, last dimension) of ``x``; all of them for None."""
    return x.flatten(0, -2) if rows is None else x.flatten(0, -2).index_select(0, rows)


def _to_rows(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """The values in their rows of a tensor with these leading dimensions, zero elsewhere."""
    shape = torch.Size([*shape[:-1], values.shape[-1]])
    if rows is None:
        # A plain view, made inside of a function of its own, is one that nothing may change in place afterwards.
        return torch.ops.aten._unsafe_view(values, shape)
    full = values.new_zeros(shape)
    full.view(-1, values.shape[-1]).index_copy_(0, rows, values)
    return full
