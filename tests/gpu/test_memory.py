"""The peak of a step of Llama 3 8B with LoRA, at its real size, on fake tensors that say they lie on a GPU.

What is counted are storages as they come and go. Fake tensors are no plain ones, so nothing is computed again in the
place of being kept (:mod:`rankalign.rows.recipes`), which large rows on a card are: the figure is an upper bound, but
for what an allocator loses between its blocks and what kernels take for themselves.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankalign.models.adapters import add_lora
from rankalign.rows.logps import list_logps
from rankalign.rows.tree import Forest

GIB = 2**30
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


class Memory(TorchDispatchMode):
    """Bytes of all storages on the device, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, DTensor):
                tensor = tensor._local_tensor
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        if storage not in self.seen:
            self.seen[storage] = True
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, storage.nbytes()).atexit = False

    def drop(self, size: int) -> None:
        self.live -= size


def on_fake_device(model: nn.Module) -> None:
    """Fake weights on the GPU in the place of those on the meta device; all differ, as this model shares none."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                    table[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def step(checkpointing: bool, prompts: int, answers: int, prompt: int, answer: int) -> tuple[int, int]:
    """Bytes of the weights, and at the peak of forward and backward under bf16, weights in bfloat16."""
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16
        )
        model = add_lora(model.train(), 16, 32, 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        on_fake_device(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        weights = memory.live
        with torch.autocast("cuda", dtype=torch.bfloat16):
            sums = list_logps(model, [[7] * prompt] * prompts, [[[9] * answer] * answers] * prompts)
        sums.sum().backward()
    return weights, memory.peak


@pytest.mark.parametrize(
    ("checkpointing", "sizes", "ceiling"),
    [(False, (2, 6, 512, 256), 45), (True, (1, 4, 1024, 1024), 24)],
    ids=["2 prompts, 6 answers, a row of 4k", "checkpointing, 4 answers of 1k"],
)
def test_a_step_of_8b_weights_fits_below_its_ceiling(
    checkpointing: bool, sizes: tuple[int, ...], ceiling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forest, "note_gradient", lambda self, grad: None)  # fake gradients have no numbers
    weights, peak = step(checkpointing, *sizes)
    assert 15 * GIB < weights < 15.3 * GIB
    assert weights < peak <= ceiling * GIB
