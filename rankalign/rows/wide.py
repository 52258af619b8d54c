"""What a model computes in float32, whatever the type of its weights and of training: the measure of rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_GROUPED = ((functional, "grouped_mm"), (torch, "_grouped_mm"))  # of experts, where this torch has them
_WITH_WEIGHTS = frozenset(
    (
        *(functional.linear, functional.layer_norm, functional.rms_norm, torch.rms_norm, torch.addmm),
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm),
        *(getattr(home, name) for home, name in _GROUPED if hasattr(home, name)),
    )
)


@contextmanager
def in_float32(lm: Any) -> Iterator[None]:
    """Mixed precision is off in this context, and 16-bit weights are widened where they are used, one at a time.

    Args:
        lm: the transformers model that runs.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(lm.device.type, enabled=False))
        stack.enter_context(all_digits(lm.device))
        if lm.dtype.itemsize == 2:
            stack.enter_context(_Widened())
        yield


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 are rounded to TF32's 10 bits of mantissa, which are float16's."""
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def all_digits(device: torch.device) -> Iterator[None]:
    """Products of float32 keep all their digits in this context, also where TF32 is on for the rest of a run."""
    if not rounds_products(device):
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "tf32"


class _Widened(TorchFunctionMode):
    """Embeddings come in float32, and so does all that is made of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WITH_WEIGHTS:
            args, kwargs = tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        return _wide(out) if func is functional.embedding else out


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Norms, angles and scores that a model of float64 weights computes in float32 stay in float64 in this context."""
    with _Doubled():
        yield


class _Doubled(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            func = Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **kwargs)
