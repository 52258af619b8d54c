"""Data-parallel training with ``device_ids``, which CPU runs never set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_with_device_ids_have_the_gradients_of_one(tmp_path: Path) -> None:
    words = [[sys.executable, "-m", "tests.gpu.ddp", str(rank), str(tmp_path / "store")] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(some, cwd=ROOT, **pipes) for some in words]
    try:
        for process in processes:
            out, told = process.communicate(timeout=120)
            assert process.returncode == 0, told[-3000:]
            assert out.split() == ["one_pass", "two_passes"]
    finally:
        for process in processes:
            process.kill()
