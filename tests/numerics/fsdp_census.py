"""Counts the bytes of a step under FSDP2 itself, rank 0 of 8 that are not there, on fake tensors: prints JSON.

Weights are float32 shards, gathered in bfloat16. The head is that of a GPU; attention is the CPU's flash kernel, which
takes as much as a GPU's. FSDP2 empties and fills storages in place, so a storage is looked at again when it is resized.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankalign.rows import head_wide, logps, whole
from rankalign.rows.tree import Forest
from rankalign.training.plan.cards import shape


class Census(TorchDispatchMode):
    """Bytes of all storages, now and at most; DTensors are shells around their shards."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if func is torch.ops.aten.nonzero.default:  # every position counts
            return torch.zeros((len(args[0]), args[0].dim()), dtype=torch.long)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        if storage not in self.sizes:
            held = self.sizes[storage] = [0]
            weakref.finalize(storage, self.drop, held).atexit = False
        self.look(storage)

    def look(self, storage: Any) -> None:
        held = self.sizes[storage]
        self.live += storage.nbytes() - held[0]
        held[0] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    @contextlib.contextmanager
    def resizing(self) -> Iterator[None]:
        """Storages that are resized in this context are looked at again."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            out = plain(storage, size)
            if storage in self.sizes:
                self.look(storage)
            return out

        with patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def drop(self, held: list[int]) -> None:
        self.live -= held[0]


def main(model: str, layers: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh, shapes = init_device_mesh("cpu", (8,)), shape(model)
    assert shapes is not None
    shapes.num_hidden_layers = layers
    with torch.device("meta"):
        lm: Any = transformers.LlamaForCausalLM._from_config(shapes, dtype=torch.float32).train()
    lm.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    whole.label_logps = head_wide.label_logps
    Forest.note_gradient = lambda self, grad: None  # type: ignore[method-assign]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), Census() as census, census.resizing():
        for layer in lm.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(lm, mesh=mesh, mp_policy=policy)
        lm.to_empty(device="cpu")
        shards = census.live
        optimiser = torch.optim.AdamW(lm.parameters(), fused=False, foreach=False)
        for _ in range(2):
            logps.list_logps(lm, [[7] * 512], [[[9] * 256] * 4]).sum().backward()
            gc.collect()
            optimiser.step()
            optimiser.zero_grad()
    print(json.dumps({"shards": shards, "peak": census.peak}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
