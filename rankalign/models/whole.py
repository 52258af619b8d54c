"""A spread model made whole for a while, where it is to write answers: each token would else be gathered for.

FSDP2 and ZeRO-3 bring a layer's weights together whenever it runs. Of training that is a share; an answer runs every
layer once a token, and the processes would have to write answers of the same length.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rankalign.models.devices import device

_CHECKPOINTED = "_checkpoint_wrapped_module."  # torch's wrapper, which puts this into names


class Whole:
    """A copy of a model that has weights only while a context lasts; all processes enter it, and it is theirs alone.

    Args:
        model: a transformers model, bare or inside PEFT, whose weights are all here still; it is spread later.

    Attributes:
        dtype: of the weights, where it is not that of the shards.
    """

    dtype: torch.dtype | None = None

    def __init__(self, model: nn.Module) -> None:
        # In deepcopy's memory each weight has a copy already, an empty one.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().new_empty(0), p.requires_grad) for p in model.parameters()
        }
        self._copy: Any = copy.deepcopy(model, memo).eval()
        self._kept: dict[str, _Share] = {}
        self._said = False

    @contextlib.contextmanager
    def now(self, model: nn.Module, root: nn.Module | None = None) -> Iterator[Any]:
        """The copy with the weights that ``model`` has now, in eval mode.

        Args:
            model: the spread one.
            root: what FSDP2 was given, where the model is a part of that.
        """
        with self._filled(_gathering(model, root)) as whole:
            yield whole

    @contextlib.contextmanager
    def kept(self) -> Iterator[Any]:
        """The copy with the weights that :meth:`keep` was given."""
        with self._filled(lambda name: self._kept[name].together()) as whole:
            yield whole

    def keep(self, model: nn.Module, root: nn.Module | None = None) -> None:
        """Keep the weights that a model has now, each process a share; arguments as for :meth:`now`."""
        whole = _gathering(model, root)
        self._kept = {name: _Share(whole(name)) for name, _ in self._copy.named_parameters()}

    @contextlib.contextmanager
    def _filled(self, find: Callable[[str], Tensor]) -> Iterator[Any]:
        try:
            for name, weight in self._copy.named_parameters():
                weight.data = find(name).to(device(), self.dtype)
            self._say()
            yield self._copy
        finally:
            for weight in self._copy.parameters():
                weight.data = weight.data.new_empty(0)

    def _say(self) -> None:
        if not self._said:
            size = sum(p.numel() * p.element_size() for p in self._copy.parameters()) >> 20
            print(f"answers: each process has all weights for as long as it writes, {size} MiB", file=sys.stderr)
        self._said = True


def _gathering(model: nn.Module, root: nn.Module | None) -> Callable[[str], Tensor]:
    """Gives whole weights by name; all processes must ask for the same ones in one order."""
    for module in (root or model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else some are what a layer computes with, perhaps in 16 bits
    own = dict(model.named_parameters(remove_duplicate=False))
    plain = {name.replace(_CHECKPOINTED, ""): weight for name, weight in own.items()}
    return lambda name: _whole(plain[name])


@torch.no_grad()
def _whole(weight: Any) -> Tensor:
    """All of a weight, in each process."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            found: Tensor = weight.detach().clone()
    else:
        found = weight.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


class _Share:
    """What a process keeps of a tensor that is whole in all of them: a run of its numbers."""

    def __init__(self, whole: Tensor) -> None:
        state = PartialState()
        self.shape, size = whole.shape, -(-whole.numel() // state.num_processes)
        own = whole.reshape(-1)[size * state.process_index :][:size]
        self.numbers = whole.new_zeros(size)
        self.numbers[: own.numel()] = own

    def together(self) -> Tensor:
        """The whole tensor; all processes take part."""
        found: Any = gather(self.numbers)
        whole: Tensor = found[: self.shape.numel()].view(self.shape)
        return whole
