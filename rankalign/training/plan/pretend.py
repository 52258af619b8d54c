"""A GPU for tensors without numbers, on a machine and a build of torch that have none.

Fake tensors say in Python that they lie on ``cuda:0``, so the rows, kernels and head are those of a GPU, and autocast
is CUDA's. To torch's C++ they say ``cpu``: its autograd starts a thread a GPU and its guards ask the driver, neither of
which is there. What C++ then makes beside such a tensor (``new_zeros``) is put back on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

GPU = torch.device("cuda", 0)
# Fused attention and 16-bit products as from compute capability 8.0 on: an Ampere card and everything newer.
_ANSWERS: dict[str, Any] = {
    "get_device_capability": lambda *_: (9, 0),
    "is_bf16_supported": lambda *_, **__: True,
}


@contextmanager
def pretended() -> Iterator[None]:
    """What runs in this context finds a GPU where rows and autocast ask for one."""
    with (
        patch.multiple(torch.cuda, **_ANSWERS),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
    ):
        yield


def asked_by_torch(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether this is torch's C++ asking where a tensor lies, and the arguments of any other operation."""
    if func is torch.ops.prim.device.default:
        return True, kwargs
    beside = args[0] if args and isinstance(args[0], Tensor) else None
    if kwargs.get("device") is not None and beside is not None and beside.device == GPU:
        return False, {**kwargs, "device": GPU}
    return False, kwargs
