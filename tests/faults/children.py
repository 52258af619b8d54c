"""Processes that run one command of rankalign and may be killed: quick to start, because a server has imported all."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["rankalign.engines.hf", "rankalign.engines.openai", "rankalign.scorers.reward_model", "rankalign.scorers.judge"]
)
PROMPTS = 40
"""How many prompts the fixture ``folder`` has."""


def start(words: list[str], log: Path, largest_file: int = 0) -> multiprocessing.context.ForkServerProcess:
    """Start ``rankalign words`` in small batches, all it prints going to ``log``.

    With ``largest_file``, no file may grow beyond so many bytes: to a program, a full disk.
    """
    process = CONTEXT.Process(target=_main, args=(words, str(log), largest_file))
    process.start()
    return process


def finish(words: list[str], log: Path, largest_file: int = 0) -> int | None:
    """Run ``rankalign words`` to its end; its exit code."""
    process = start(words, log, largest_file)
    process.join()
    return process.exitcode


def killed(process: multiprocessing.context.ForkServerProcess) -> bool:
    """Kill a process with SIGKILL; False if it had ended by itself."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _main(words: list[str], log: str, largest_file: int) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from rankalign.cli import main
    from rankalign.engines import hf, openai_client
    from rankalign.stages import generation

    hf.MAX_ROWS = 8
    openai_client.FIRST_DELAY_S, openai_client.LONGEST_DELAY_S, openai_client.TRIES = 0.01, 0.1, 20
    generation.SCORE_BATCH = 2
    os.fsync = _slow_sync
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(words))


def _slow_sync(handle: int, sync: Callable[[int], None] = os.fsync) -> None:
    """A disk slow enough that a kill can fall between any two batches, however fast they are computed."""
    time.sleep(0.005)
    sync(handle)
    time.sleep(0.005)
