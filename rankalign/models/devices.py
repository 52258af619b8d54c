"""Where models lie, and in what type their weights are held."""

from __future__ import annotations

import os

import torch

from rankalign.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
