"""Two processes on one CPU: how tests launch them and read what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rankalign.data.records import CandidateSet, Response, write
from rankalign.training.moving import FILE as REFERENCE

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(__file__).with_name("cpu_launch.py")

# What accelerate must have made of each launch, and the class around the model; zero3's DeepSpeedEngine is zero2's too.
LAUNCHED = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "fsdp": ("FSDP", "FSDP"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
}


def write_data(path: Path, prompts: int = 9) -> Path:
    """Ragged lists; so many that two processes are left with one prompt at the end of an epoch."""
    rng = random.Random(3)
    sets = []
    for i in range(prompts):
        texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(2, 12))) for _ in range(rng.randint(2, 5))]
        answers = [Response(text, finished=True, scores={"toy": float(rng.randint(0, 4))}) for text in texts]
        sets.append(CandidateSet(f"p{i}", "prompt " + "x" * rng.randint(0, 9), answers))
    write(path, sets)
    return path


def settings(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Ten updates of two micro-batches with 2 x 1 prompts, or one with 4 x 1; the third is short.

    AdamW divides by the size of the gradient, so a mean over the wrong number of prompts would hardly show in the
    weights; clipping the gradient by its norm, and the norm itself in the log, make it show.
    """
    fixed = {"model": "tiny", "data": str(data), "output_dir": str(output), "max_steps": 10, "save_steps": 5}
    fixed |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "logging_steps": 1, "disable_tqdm": True}
    return {**fixed, "max_grad_norm": 20.0, "gradient_accumulation_steps": 2, **more}


def command(kind: str, words: Sequence[str]) -> list[str]:
    """The documented line with overrides for the CPU: two processes, no bf16, the launcher for ``-m rankalign``."""
    python = [sys.executable, "-m"]
    if kind == "ddp":
        start = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        port = str(20000 + os.getpid() % 20000)
        config = str(ROOT / "train_scripts" / "accelerate" / f"{kind}.yaml")
        start = [*python, "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
        start += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", port]
    return [*start, str(LAUNCHER), *words]


def flags(words: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def launch(kind: str, facts: Path, words: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANKALIGN_TEST_FACTS": str(facts), **environment}
    line = command(kind, ["train", *flags(words)])
    return subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def launch_and_kill(kind: str, words: Sequence[str], when: Callable[[], bool]) -> bool:
    """Start two processes and their launcher, and kill all of them as a power cut would; False where they had ended."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(kind, words), env=env, cwd=ROOT, start_new_session=True, **quiet)
    try:
        while process.poll() is None and not when():
            time.sleep(0.01)
        return process.poll() is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for worker in _workers_of(words):  # the launcher gives each worker a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def _workers_of(words: Sequence[str]) -> list[int]:
    """Processes whose command line ends in these words, which name a folder that no one else's do."""
    ending = b"\0".join(word.encode() for word in words) + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().endswith(ending):
                found.append(int(path.parent.name))
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by name; those of a reference that moves, which lie beside them, under their own."""
    (file,) = (path for path in folder.glob("*.safetensors") if path.name != REFERENCE)
    if (folder / REFERENCE).exists():
        return load_file(file) | {f"reference {name}": t for name, t in load_file(folder / REFERENCE).items()}
    return load_file(file)


def furthest(a: Path, b: Path) -> float:
    """Largest difference between the weights of two folders, which must have the same names and float32."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert all(weight.dtype == torch.float32 for weight in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, less what a clock wrote."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
