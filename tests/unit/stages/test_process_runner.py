"""The runner ``processes``: a GPU to each, and none that outlives the command that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from rankalign.data.records import CandidateSet
from rankalign.stages.processes import run_in_processes

BATCHES = [[CandidateSet(f"p{i}", "x")] for i in range(6)]


class Sees:
    """Tells which GPUs its process sees."""

    name = "sees"

    def __init__(self, gpus: int = 1) -> None:
        self.gpus = gpus

    def __call__(self, batch: Any) -> list[Any]:
        time.sleep(0.2)  # so that no process does all of them
        return [os.environ.get("CUDA_VISIBLE_DEVICES") for _ in batch]


@pytest.mark.parametrize(
    ("visible", "gpus", "seen"), [("", 1, {"0", "1", "2"}), ("5,7,9", 2, {"5,7"}), ("4,6,8", 1, {"4", "6", "8"})]
)
def test_each_process_has_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int, seen: set[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = {value for _, values in run_in_processes(Sees(gpus), BATCHES, 3) for value in values}
    assert found <= seen
    assert len(found) > 1 or len(seen) == 1


class Waits:
    """Writes down its process, and takes its time."""

    name = "waits"

    def __call__(self, batch: Any) -> list[Any]:
        print(os.getpid(), flush=True)
        time.sleep(60)
        return []


def test_processes_end_with_the_command_that_started_them() -> None:
    code = "from tests.unit.stages.test_process_runner import *\nlist(run_in_processes(Waits(), BATCHES, 1))"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    worker = int(command.stdout.readline())
    command.send_signal(signal.SIGKILL)
    command.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and os.path.exists(f"/proc/{worker}"):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")
