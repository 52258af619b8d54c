"""Activations that cost little to compute again are not kept for backward: norms, activation functions, products.

Autograd keeps what every operation needs for its gradient. Much of that is a cheap function of something it keeps as
well: the input of a linear layer is the norm of the residual stream, that of the last layer of a gated MLP is
silu(gate) * up. Inside :func:`cheap_again` such a tensor is kept as the recipe that made it, a chain of elementwise
operations down to tensors that are there anyway, and backward follows the recipe, for the rows that a gradient reaches.
The numbers are the same to the bit where all rows count, for the same operations run on the same values. Matrix
products and attention never run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rankalign.rows.tree import Forest

PRODUCTS = frozenset((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul))
# Keeping the inputs of these in the place of their result never takes more: their gradient keeps them anyway, or the
# result is as large as the one input.
_BY_ROW = PRODUCTS | frozenset(
    (
        *(Tensor.pow, Tensor.__pow__, torch.pow, Tensor.neg, Tensor.tanh, torch.tanh, torch.sigmoid),
        *(functional.silu, functional.gelu, functional.relu, torch.relu),
        *(functional.layer_norm, functional.rms_norm, torch.rms_norm),
    )
)
_VIEWS = frozenset((Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.unsqueeze, Tensor.flatten, Tensor.contiguous))
_SUMS = frozenset((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add, Tensor.sub, Tensor.__sub__))
_CASTS = frozenset((Tensor.to, Tensor.float, Tensor.type))
_CHEAP = _BY_ROW | _VIEWS | _SUMS | _CASTS
# Neither quantised nor distributed. Fake ones stand for plain ones: what is planned is the program that will run.
PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))
_RECIPE = "_rankalign_recipe"
BY_HOST = 2**33  # 3.6k tokens of a model of 1.5B weights, 500 of one of 8B


@contextmanager
def cheap_again(model: nn.Module, forest: Forest | None = None) -> Iterator[None]:
    """What runs in this context keeps recipes for its backward, which may run outside of it.

    Args:
        model: the transformers model that runs. Nothing changes where its layers run again in backward anyway, or its
            weights are sharded, and so come and go around its forward.
        forest: the row that runs, whose ``active`` is read when backward runs; None where every row counts.
    """
    if not torch.is_grad_enabled() or layers_run_again(model) or any(map(out_of_reach, model.modules())):
        yield
        return
    with _Recorder(), saved_tensors_hooks(_pack, partial(_unpack, forest)):
        yield


def bound_by_host(model: Any, tokens: int) -> bool:
    """Whether a row is so small on a GPU that Python takes longer over a layer than the GPU does.

    There neither this module nor :mod:`rankalign.rows.linears` pays: they take a mode in Python around every operation
    and up to 90 launches more a layer, about half a millisecond. That is what a large card needs for the products of a
    layer at ``BY_HOST`` multiplications a square matrix, and from there on memory and rows left out weigh more.
    """
    return model.device.type == "cuda" and tokens * model.config.get_text_config().hidden_size ** 2 < BY_HOST


def layers_run_again(model: nn.Module) -> list[nn.Module]:
    """The modules under gradient checkpointing."""
    return [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]


def out_of_reach(module: nn.Module) -> bool:
    """Whether torch's own checkpoint wrapper recomputes a module, which must find what it has seen, or its weights are
    sharded (FSDP2, ZeRO-3)."""
    zero3 = any(hasattr(parameter, "ds_id") for parameter in module._parameters.values())
    return hasattr(module, "checkpoint_fn") or isinstance(module, FSDPModule) or zero3


_asked = threading.local()


@contextmanager
def rows_alone() -> Iterator[None]:
    """What is computed again in this context may be the rows that a gradient reaches, (rows, last dimension), and not
    all; a tensor that was kept still comes whole."""
    _asked.alone = True
    try:
        yield
    finally:
        _asked.alone = False


class _Kept:
    """A tensor that is kept as it is.

    Attributes:
        roots: identities of the storages that must stay for it.
    """

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the result of an operation that keeps its result would otherwise keep itself alive.
        self.tensor, self.version = tensor.detach(), tensor._version
        self.roots = frozenset((tensor.untyped_storage()._cdata,))

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it has been changed in place.
        """
        if self.tensor._version != self.version:
            raise RuntimeError("a tensor that backward needs was changed in place after forward had used it")
        return self.tensor

    def rows(self, rows: Tensor) -> Tensor:
        """(rows, last dimension) of it."""
        return self.value().flatten(0, -2).index_select(0, rows)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tensor.device


@dataclass(eq=False)
class _Recipe:
    """The operation that makes a tensor again, and what it is applied to.

    Attributes:
        function: the operation.
        args: its arguments, tensors as what is kept for them.
        kwargs: its other arguments, none of them a tensor.
        roots: as in :class:`_Kept`.
        shape: of the result.
        device: of the result.
        version: of the result, which may be changed in place later.
        autocast: device type and data type of the mixed precision it ran under.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roots: frozenset[int]
    shape: torch.Size
    device: torch.device
    version: int
    autocast: tuple[str, torch.dtype] | None

    def value(self) -> Tensor:
        """The result, computed again."""
        return self._apply([arg.value() if isinstance(arg, (_Kept, _Recipe)) else arg for arg in self.args])

    def rows(self, rows: Tensor) -> Tensor:
        """(rows, last dimension) of it; where every operation goes row by row, no other row is computed."""
        parts = [arg for arg in self.args if isinstance(arg, (_Kept, _Recipe))]
        if self.function in _VIEWS or not all(len(p.shape) <= 1 or self._is_long(p) for p in parts):
            return self.value().flatten(0, -2).index_select(0, rows)
        return self._apply([self._some(arg, rows) for arg in self.args])

    def _some(self, arg: Any, rows: Tensor) -> Any:
        if not isinstance(arg, (_Kept, _Recipe)):
            return arg
        return arg.rows(rows) if self._is_long(arg) else arg.value()

    def _is_long(self, part: _Kept | _Recipe) -> bool:
        """Whether it has as many rows as the result."""
        return len(part.shape) > 1 and part.shape[:-1] == self.shape[:-1]

    def _apply(self, args: list[Any]) -> Tensor:
        with torch.autocast(*self.autocast) if self.autocast else nullcontext():
            return self.function(*args, **self.kwargs)


class _Recorder(TorchFunctionMode):
    """Attaches recipes to the results of cheap operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _CHEAP and type(out) in PLAIN and out.requires_grad:
            recipe = _recipe(func, args, kwargs, out)
            if recipe is not None:
                setattr(out, _RECIPE, recipe)
        return out


def _recipe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> _Recipe | None:
    """How to make ``out`` again, or None where keeping it takes less."""
    if any(arg is out for arg in args) or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    parts = [_pack(arg) if isinstance(arg, Tensor) else arg for arg in args]
    inputs = [part for part in parts if isinstance(part, (_Kept, _Recipe))]
    roots = frozenset[int]().union(*(part.roots for part in inputs))
    if func in _SUMS and all(part.roots != roots for part in inputs):
        return None  # the gradient of a sum keeps neither summand
    if func in _CASTS and isinstance(inputs[0], _Kept) and out.element_size() < args[0].element_size():
        return None
    device = out.device.type
    autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    return _Recipe(func, tuple(parts), kwargs, roots, out.shape, out.device, out._version, autocast)


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    recipe: _Recipe | None = getattr(tensor, _RECIPE, None)
    return recipe if recipe is not None and recipe.version == tensor._version else _Kept(tensor)


@torch.no_grad()
def _unpack(forest: Forest | None, packed: _Kept | _Recipe) -> Tensor:
    """The tensor; of an activation that is computed again, rows that no gradient reaches are one: what they would be is
    multiplied by a gradient of zero, and one is in the domain of powers, roots and quotients."""
    activation = forest is not None and isinstance(packed, _Recipe) and packed.shape[:-1] == (1, forest.size)
    alone = getattr(_asked, "alone", False)
    if packed.device.type == "cuda":  # which computes all rows sooner than it picks some and puts them back
        activation = activation and alone
    rows = forest.active_rows(packed.device) if forest is not None and activation else None
    if rows is None:
        return packed.value()
    some = packed.rows(rows)
    if alone:
        return some
    whole = some.new_ones(packed.shape)
    whole[0].index_copy_(0, rows, some)
    return whole
