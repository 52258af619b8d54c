"""What a bug report needs: versions, processor, memory, GPUs, which extras are there. No names, paths or keys."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import rankalign
from rankalign.commands import fact_table, show_facts
from rankalign.evaluation.tables import Table

EXAMPLE = "rankalign env --table env.md"
show = show_facts
# Settings of the machine that change what runs or how fast; a value is told only where it can hold no secret.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "HF_HUB_OFFLINE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Gather it; an installed package is asked for its version, only torch is imported."""
    import torch

    gpus = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "rankalign": rankalign.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(_memory() / 2**30, 1),
        "cuda": torch.version.cuda or "not in this torch",
        "gpus": ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus) or "none",
    }
    core, extras = _requirements()
    facts["packages"] = {name: _version(name) for name in core}
    facts["extras"] = {extra: _found(names) for extra, names in extras.items()}
    facts["environment"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return facts


def tables(result: dict[str, Any]) -> list[Table]:
    """One table, a fact a row."""
    return [fact_table("environment", result)]


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux machines
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of memory of the machine; a container's limit is not looked at."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform != "win32" else 0


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Names of the packages that the core and each extra ask for, as the installed metadata has them."""
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("rankalign") or []:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        if name != "rankalign":
            (extras.setdefault(extra[1], []) if extra else core).append(name)
    return core, {extra: names for extra, names in extras.items() if extra not in ("dev", "docs")}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _found(names: list[str]) -> str:
    return ", ".join(f"{name} {_version(name)}" for name in names)
