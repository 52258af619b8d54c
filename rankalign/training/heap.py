"""The heap of a process that trains on a CPU: glibc is told how large tensors are, and holes are handed back.

glibc's malloc gives a freed block out again only where a new one fits beside what aligning it takes, and small objects
come to lie between: a layer's passing tensors leave holes that nothing fits into, up to as much as all that is kept.
Three things keep them few, and cost less processor time than they save:

* torch asks for tensors of 2 MiB and more by pages, and for large pages where the system has them
  (``THP_MEM_ALLOC_ENABLE``, which the command line sets): what aligning leaves over is then large enough to be joined
  to its neighbours.
* :func:`settle` fixes the size from which blocks are mapped one by one, which glibc else raises as it learns, so that
  large tensors of the first update do not lie apart from those of the second.
* :class:`Trim` hands free pages back whenever the process has grown by :func:`growth` since it last did, between the
  modules of a layer and both ways, so that hardly more than that is held in holes at the peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

MAPPED = 32 << 20  # bytes from which a block is mapped by itself: the most that glibc lets itself learn
TOP = 2 * MAPPED  # free bytes at the end of the heap from which they are given back, as glibc would choose beside it
GROWTH = 64 << 20  # bytes at the least between two times that holes are handed back
SHARE = 8  # of what is held, beyond which they are: each time costs page faults for what is asked for again
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def settle() -> bool:
    """Set glibc's thresholds; returns whether this is glibc, and nobody has set them before (``MALLOC_..._``)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or trim() is None or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED) and mallopt(_M_TRIM_THRESHOLD, TOP))


def trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``, or None where there is none."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found if sys.platform == "linux" else None


def growth(held: int) -> int:
    """Bytes by which a process that holds so many grows before holes go back: an eighth, 64 MiB at the least."""
    return max(GROWTH, held // SHARE)


class Trim:
    """Hands free pages back where the process has grown, at the ends of layers and of their modules, both ways.

    Args:
        model: whose layers are watched; its hooks stay until :meth:`close`.
        within: watch the modules of each layer, too: not where they are compiled, which hooks would cut up.
    """

    def __init__(self, model: nn.Module, within: bool = True) -> None:
        self._trim, self._last = trim(), resident()
        self.count = 0  # how often
        modules = [m for layer in _layers(model) for m in (layer.modules() if within else [layer])]
        self._hooks = [module.register_forward_hook(self._after) for module in modules] if self._trim else []

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _after(self, layer: nn.Module, args: Any, out: Any) -> None:
        states = out[0] if isinstance(out, tuple) else out
        if getattr(states, "requires_grad", False):
            states.register_hook(self._on_the_way_back)
        self.look()

    def _on_the_way_back(self, _: Any) -> None:
        self.look()

    def look(self) -> None:
        """Hand free pages back if the process has grown by :func:`growth`."""
        if self._trim is not None and resident() > self._last + growth(self._last):
            self._trim(0)
            self.count += 1
            self._last = resident()


@contextlib.contextmanager
def trimmed(model: nn.Module, within: bool = True) -> Iterator[Trim]:
    """A :class:`Trim` for as long as the context lasts; arguments as there."""
    watch = Trim(model, within)
    try:
        yield watch
    finally:
        watch.close()


def resident() -> int:
    """Bytes that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the longest stack."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len, default=[])
