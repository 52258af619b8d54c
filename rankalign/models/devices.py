"""Where models lie, and in what type their weights are held."""

from __future__ import annotations

import os
from typing import Any

import torch

from rankalign.errors import InputError
from rankalign.registry import did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate may lay the layers of a model over the GPUs, and the CPU where those do not hold it."""
_cpu_only = False


def stay_on_cpu(yes: bool) -> None:
    """Load models on the CPU from now on even where there is a GPU (``--use_cpu``), or no longer."""
    global _cpu_only
    _cpu_only = yes


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none, or :func:`stay_on_cpu` or ``$ACCELERATE_USE_CPU`` says so."""
    asked = _cpu_only or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.device("cuda" if torch.cuda.is_available() and not asked else "cpu")


def pick_dtype(name: str) -> torch.dtype:
    """The type behind ``auto`` or a name in DTYPES, for the device in use.

    Raises:
        InputError: an unknown name, or float16 on a CPU.
    """
    on_cpu = device().type == "cpu"
    if name == "auto":
        return torch.float32 if on_cpu else torch.bfloat16
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r} (one of: auto, {', '.join(DTYPES)})")
    if name == "float16" and on_cpu:
        raise InputError("dtype float16 needs a GPU, and this machine has none: use float32 or bfloat16")
    return DTYPES[name]


def check_device_map(name: str, who: str) -> None:
    """Refuse a way of laying a model over devices that there is not.

    Args:
        name: empty, or one of DEVICE_MAPS.
        who: asks, for the message.

    Raises:
        InputError: an unknown name.
    """
    if name and name not in DEVICE_MAPS:
        known = ", ".join(DEVICE_MAPS)
        raise InputError(f"{who}: unknown device_map {name!r}{did_you_mean(name, DEVICE_MAPS)} (one of: {known})")


def over_devices(name: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a ``device_map``; where models stay on the CPU, all layers lie there."""
    if not name:
        return {}
    check_device_map(name, "model")
    return {"device_map": name if device().type != "cpu" else {"": "cpu"}}


def is_over_devices(model: Any) -> bool:
    """Whether the layers of a model lie on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1
