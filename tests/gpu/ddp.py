"""One of two processes of data-parallel training as GPUs have it, where DDP is given ``device_ids``: its gradients are
those of one process over both halves of the data. ``python -m tests.gpu.ddp RANK STORE``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankalign.models import tiny
from rankalign.rows.logps import list_logps
from rankalign.rows.two_pass import backward_two_pass

PROMPTS = [[7, 8, 9], [10, 11]]
RESPONSES = [[[12, 13], [14, 15, 16]], [[17, 18, 19], [20, 21]]]


def one_pass(model: Any, prompts: Any, responses: Any) -> None:
    list_logps(model, prompts, responses).sum().backward()


def two_passes(model: Any, prompts: Any, responses: Any) -> None:
    backward_two_pass(model, prompts, responses, Tensor.sum, 5)


def gradients(backward: Callable[..., None], model: nn.Module, *texts: Any) -> dict[str, Tensor]:
    model.zero_grad()
    backward(model, *texts)
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(backward: Callable[..., None], rank: int) -> None:
    torch.manual_seed(0)
    alone = tiny.build_model()
    expected = gradients(one_pass, alone, PROMPTS, RESPONSES)
    torch.manual_seed(0)
    model: Any = nn.parallel.DistributedDataParallel(tiny.build_model())
    model.device_ids, model.device_type = [0], "cpu"  # what accelerate gives on a GPU, but for the device
    found = gradients(backward, model, PROMPTS[rank : rank + 1], RESPONSES[rank : rank + 1])
    worst = max(float((2 * found[n] - g).abs().max()) for n, g in expected.items())
    assert worst < 1e-4, worst
    print(backward.__name__, flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    for way in (one_pass, two_passes):
        compare(way, int(sys.argv[1]))
    dist.barrier()
    os._exit(0)  # taking gloo's threads down at the end may hang, and says nothing about the gradients
