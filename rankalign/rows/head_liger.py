"""The language-model head of Liger (Hsu et al. 2024, https://arxiv.org/abs/2410.10989), to compare with ours.

Its logits have the type of the hidden states, so in bfloat16 they carry three digits before the softmax is taken, where
ours carry the float32 sums of the products; and it waits for the device once a call. Chosen by ``--head liger``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from rankalign.errors import InputError

if TYPE_CHECKING:
    from rankalign.rows.head import Head

LEAST = "0.8.5"  # before it gradients of a loss a position were scaled after they had been summed
chosen = False


def choose(name: str, on_gpu: bool) -> None:
    """Take Liger's head (``liger``) or ours (``ours``) on GPUs from now on.

    Args:
        name: which.
        on_gpu: whether models run on one.

    Raises:
        InputError: it cannot run here.
    """
    global chosen
    if name == "liger":
        try:
            version = importlib.metadata.version("liger_kernel")
            old = Version(version) < Version(LEAST)
        except (importlib.metadata.PackageNotFoundError, InvalidVersion):
            version, old = "none", True
        if old:
            raise InputError(f"--head liger needs: pip install 'liger-kernel>={LEAST}' (here is {version})")
        if not on_gpu:
            raise InputError("--head liger runs on GPUs alone: leave it out, or --use_cpu")
    chosen = name == "liger"


def label_logps(head: Head, hidden: Tensor, labels: Tensor, on_grad: Callable[[Tensor], None] | None = None) -> Tensor:
    """As :func:`rankalign.rows.head.label_logps`."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    call: Any = liger_fused_linear_cross_entropy
    # It knows a cap and no scale: that of the logits goes to the states and the bias.
    bias = head.bias if head.bias is None or head.scale == 1.0 else head.bias * head.scale
    states = hidden if head.scale == 1.0 else hidden * head.scale
    if not torch.is_autocast_enabled(hidden.device.type):
        states = states.to(head.weight.dtype)
    sums: dict[str, Any] = {"reduction": "none", "softcap": head.cap, "accum_dtype": torch.float32}
    # Its own mark of what is not to be learned is -100, which no label is.
    logps: Tensor = -call(states, head.weight, labels, bias, **sums)
    if on_grad is not None and logps.requires_grad:
        logps.register_hook(on_grad)  # type: ignore[no-untyped-call]
    return logps
