"""One process of FSDP2 over gloo, with the policy that accelerate makes of ``--bf16`` and with ours: says whether the
log-probabilities of its rows have more digits than bfloat16. ``python -m tests.numerics.fsdp_digits STORE``."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard

from rankalign.models import tiny
from rankalign.rows.logps import list_logps
from rankalign.training.processes import keep_digits


def digits(plugin: Any) -> str:
    """What becomes of log-probabilities of one token each, whose sums add no digits."""
    policy, model = plugin.mixed_precision_policy, tiny.build_model()
    for part in (*model.model.layers, model):
        fully_shard(part, mp_policy=policy)
    sums = list_logps(model, [[7, 8, 9]], [[[12], [14], [15], [16]]])
    sums.sum().backward()
    kept = bool((sums != sums.bfloat16().float()).any())
    return f"{'kept' if kept else 'rounded'} {policy.param_dtype} {policy.reduce_dtype}"


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    plugin: Any = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    print(digits(plugin), flush=True)
    keep_digits(plugin)
    print(digits(plugin), flush=True)
    os._exit(0)  # as in tests/gpu/ddp.py
