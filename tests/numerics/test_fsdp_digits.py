"""FSDP2 under ``--bf16``: weights and products in 16 bits, log-probabilities and sums of gradients in float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from rankalign.training.processes import keep_digits

ROOT = Path(__file__).resolve().parents[2]


def test_log_probabilities_keep_their_digits(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.numerics.fsdp_digits", str(tmp_path / "store")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    theirs, ours = done.stdout.splitlines()[-2:]
    assert theirs == "rounded torch.bfloat16 torch.bfloat16"  # if accelerate changes its policy, ours may go
    assert ours == "kept torch.bfloat16 torch.float32"


def test_a_policy_of_the_users_own_stays() -> None:
    keep_digits(None)
    for own in (None, MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=None)):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=own)
        before = plugin.mixed_precision_policy
        keep_digits(plugin)
        assert plugin.mixed_precision_policy is before
