"""Conditions on numbers that the device still computes, looked at together, so that the host waits once for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Checks:
    """What must hold before an update is made.

    On a CPU each condition is looked at where it is stated. On a GPU that would make the host wait, and the GPU run dry
    while it does; there conditions wait for :meth:`settle`.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Callable[[list[bool]], Exception]]] = []

    def require(self, fine: Tensor, error: Callable[[list[bool]], Exception]) -> None:
        """State that all of ``fine`` (n,) are true; ``error`` makes of them what is raised where one is not."""
        self._open.append((fine.detach(), error))
        if fine.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Raise the first error among the conditions since the last call."""
        found, self._open = self._open, []
        if not found:
            return
        values = iter(torch.cat([fine for fine, _ in found]).tolist())
        for fine, error in found:
            own = [next(values) for _ in range(len(fine))]
            if not all(own):
                raise error(own)
