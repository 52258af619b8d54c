"""Free pages go back to the system between layers, and only where the process has grown; numbers stay what they are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rankalign.training import heap

linux = pytest.mark.skipif(sys.platform != "linux" or heap.trim() is None, reason="glibc's")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.inner(x).tanh(), None


class Stack(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.again = nn.ModuleList(Layer() for _ in range(5)), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)[0] if self.again else layer(x)[0]
        return x.sum()


@linux
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_it_looks_between_layers_both_ways_and_changes_no_bit(
    again: bool, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, looks = Stack(again), torch.randn(3, 8), list[int]()
    model(x).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(heap.Trim, "look", lambda self: looks.append(len(self._hooks)))
    with heap.trimmed(model, within):
        value, modules = model(x), 5 * (1 + within)
        assert looks == [modules] * modules
        value.backward()
        # What checkpointing runs again stops before a layer's end, and not before that of what is within.
        assert len(looks) == 2 * modules + 5 * (again and within)
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), plain, strict=True))  # type: ignore[arg-type]
    looks.clear()
    model(x).backward()
    assert not looks


@linux
def test_holes_go_back_once_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: 300 blocks of a megabyte, of which every other one is freed."""
    program = """
import torch
from torch import nn
from rankalign.training import heap
assert heap.settle()
with heap.trimmed(nn.Sequential()) as watch:
    start = heap.resident()
    blocks = [torch.ones(1 << 18) for _ in range(300)]
    del blocks[::2]
    held = heap.resident() - start
    watch.look()
    print(held >> 20, heap.resident() - start >> 20, watch.count)
    watch.look()
    assert watch.count == 1
"""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, left, count = map(int, done.stdout.split())
    assert held >= 295
    assert 149 <= left <= 160
    assert count == 1


def test_nothing_is_set_where_somebody_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert not heap.settle()
