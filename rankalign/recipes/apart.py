"""A training run in processes of its own, which a recipe starts and waits for."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankalign.errors import InputError, Interrupted
from rankalign.recipes.launch import launcher
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import dumps

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def train_apart(settings: dict[str, Any], file: Path, how: str, processes: int) -> None:
    """``rankalign train`` under a launcher, with all that it prints on stderr.

    Where this process is told to stop, so is the training, which writes a checkpoint; where it is killed, too. A next
    one waits until the training of a killed one has come to its end, before it goes on from there.

    Args:
        settings: of ``rankalign train``; they are written to ``file``.
        file: beside it lies the lock.
        how: a key of :data:`rankalign.recipes.launch.FILES`.
        processes: how many.

    Raises:
        InputError: it ended with an error, which it has told.
        Interrupted: it was stopped by a signal.
    """
    write_text(file, dumps(settings) + "\n")
    command = launcher(how, processes, ["--config", str(file)])
    print(f"starting: {shlex.join(command)}", file=sys.stderr, flush=True)
    with _lock(file.with_suffix(".lock")) as lock, _passed_on() as (started, caught):
        process = _start(command, lock)
        started.append(process)
        code = process.wait()
    if caught:
        raise Interrupted("the training was stopped; the same command goes on from its checkpoint")
    if code:
        raise InputError(f"the training of {file.parent} ended with code {code}; what it said stands above")


def _start(command: Sequence[str], lock: int) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # Its results are this command's to tell: what it prints goes where messages go.
    return subprocess.Popen(command, env=env, stdout=2, pass_fds=(lock,), preexec_fn=stop_with_parent)


def stop_with_parent() -> None:
    """Have the kernel tell this process to stop when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """A lock that the launcher holds on to as well, until it ends, whatever becomes of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: held by the training of an earlier command, which is waited for", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _passed_on() -> Iterator[tuple[list[subprocess.Popen[bytes]], list[int]]]:
    """Tell a process to stop when this one is told; gives a list for it, and the signals that came."""
    started: list[subprocess.Popen[bytes]] = []
    caught: list[int] = []

    def tell(number: int, frame: Any) -> None:
        caught.append(number)
        for process in started:
            process.send_signal(signal.SIGTERM)  # of Ctrl-C, too, which a launcher takes twice for impatience

    old = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield started, caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
