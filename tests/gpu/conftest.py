"""A CUDA device for these tests: the machine's own, or the pretended one, which has to be there before torch is.

So they run in a process of their own (``make test`` starts one). Where torch came first, they are left out.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

REAL = shutil.which("nvidia-smi") is not None
TOO_LATE = not REAL and "torch" in sys.modules and "tests.gpu.pretend_cuda" not in sys.modules
collect_ignore_glob = ["test_*.py"] if TOO_LATE else []

if not REAL and not TOO_LATE:
    pretend_cuda = importlib.import_module("tests.gpu.pretend_cuda")
    for library in ("accelerate", "bitsandbytes", "deepspeed", "peft", "transformers.training_args"):
        importlib.import_module(library)  # asks at import what device there is and would set up kernels of its own
    pretend_cuda.enable()


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of each of these small runs, which would tell nothing, takes longer than the run."""
    if REAL:
        return
    from rankalign.errors import InputError
    from rankalign.training.plan import verdict

    def plan(*_: Any, **__: Any) -> None:
        raise InputError("not of a pretended device")

    monkeypatch.setattr(verdict, "plan", plan)


@pytest.fixture
def any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged flash attention in float64, to the last digits: the pretended device alone can."""
    if REAL:
        pytest.skip("flash kernels are compiled for 16 bits")
    from tests.gpu import flash_emulation

    monkeypatch.setattr(flash_emulation, "any_type", True)


@pytest.fixture
def watch() -> Iterator[Any]:
    """Notes launches, waits and uploads, on the pretended device alone."""
    if REAL:
        pytest.skip("launches are counted on the pretended device")
    from tests.gpu.pretend_cuda import watch

    return watch


@pytest.fixture(autouse=True)
def _programs_of_its_own() -> Iterator[None]:
    """A test compiles its own: torch counts a function's programs over the process, and refuses the ninth."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
