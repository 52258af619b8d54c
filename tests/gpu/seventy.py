"""One of eight processes that train a model of 70B weights by FSDP2: ``python -m tests.gpu.seventy LAYERS OUT``.

The others are not there: torch's fake process group answers for them, at once and with nothing. Tensors are fake, so
they have sizes, types and a device, and no numbers. All 80 layers are outlined, spread by accelerate as training does
it, given room on the pretended GPU, run forward and backward, updated by AdamW and saved.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

pretend_cuda = importlib.import_module("tests.gpu.pretend_cuda")  # before torch
for library in ("accelerate", "bitsandbytes", "deepspeed", "peft", "transformers.training_args"):
    importlib.import_module(library)
pretend_cuda.enable()

import torch  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from rankalign.models import sharded, weights  # noqa: E402
from rankalign.rows.logps import list_logps  # noqa: E402
from rankalign.rows.tree import Forest  # noqa: E402
from rankalign.training import spread  # noqa: E402
from rankalign.training.arguments import parse_settings  # noqa: E402
from tests.gpu.test_memory import Memory  # noqa: E402

LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


class Counted:
    """In the place of a gathered tensor's bytes, of which fake ones have none: their number."""

    total = largest = 0

    def __init__(self, tensor: Any) -> None:
        size = tensor.numel() * tensor.element_size()
        Counted.total, Counted.largest = Counted.total + size, max(Counted.largest, size)


class Shrinking(Memory):
    """FSDP2 frees gathered weights by shrinking their storage to nothing, and fills it again; no dispatch sees that."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        for name in ("free_storage", "alloc_storage"):
            setattr(_fsdp_param, name, self.noting(getattr(_fsdp_param, name)))

    def note(self, storage: Any) -> None:
        if storage not in self.sizes:
            self.sizes[storage] = size = [storage.nbytes()]
            self.live += size[0]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, lambda: self.drop(size[0])).atexit = False

    def noting(self, change: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def changed(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            self.note(storage)
            change(tensor)
            self.live += storage.nbytes() - self.sizes[storage][0]
            self.sizes[storage][0] = storage.nbytes()
            self.peak = max(self.peak, self.live)

        return changed


def main(layers: int, out: Path) -> None:
    config = parse_settings({"model": "tiny", "data": "none", "bf16": True, "output_dir": str(out / "run")})
    facts: dict[str, Any] = {"way": spread.by_parts(config)}
    made = transformers.LlamaConfig(num_hidden_layers=layers, **LLAMA_70B)
    model = sharded.outline(transformers.AutoModelForCausalLM, made, torch.float32)
    facts["weights"] = sum(p.numel() for p in model.parameters())
    Forest.note_gradient = lambda self, grad: None  # type: ignore[method-assign]  # fake gradients have no numbers
    weights.TensorBits, weights.blocks = Counted, lambda bits: ()  # type: ignore[assignment, misc]
    model, device = spread._shard(config, model)
    facts["device"] = device.type
    with FakeTensorMode(allow_non_fake_inputs=True), Shrinking() as memory:
        sharded.fill(model, {}, {}, device)
        facts["held"] = memory.live
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            sums = list_logps(model.train(), [[7] * 64] * 2, [[[9] * 32] * 4] * 2)
        sums.sum().backward()
        facts |= {"peak": memory.peak, "gradients": sum(p.grad.to_local().nbytes for p in model.parameters())}
        optimizer.step()
        del sums
        optimizer.zero_grad()
        facts["updated"] = memory.live
        memory.peak = memory.live
        sharded.save(model, out / "saved", True)
        facts |= {"saving": memory.peak - memory.live, "saved": Counted.total, "largest": Counted.largest}
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)
