"""The process that a row trains in, and the lock that it inherits."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from rankalign.errors import InputError
from rankalign.recipes.apart import stop_with_parent
from rankalign.storage.files import read_text
from rankalign.storage.jsonl import dumps, loads


class Lock:
    """Only one process works on a table. A child inherits the lock: what outlives a killed parent still holds it.

    Raises:
        InputError: on entering, where another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.handle = folder / "lock", -1

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.handle)
            raise InputError(
                f"{self.path.parent}: another process is at it (or the training that a killed one left behind); "
                "wait for it or stop it"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.handle)


@dataclass(frozen=True)
class Inherited:
    """The lock of the process that started this one.

    Attributes:
        handle: its file, which was passed on.
    """

    handle: int


def run_metered(
    folder: Path, command: str, settings: dict[str, Any], lock: Lock | Inherited
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run ``rankalign command`` with ``settings`` in a process of its own; what it says goes to ``train.log``.

    Returns:
        Its result, and ``{"seconds", "peak_bytes"}`` of that process.

    Raises:
        InputError: it failed, with its last words.
    """
    config, took, log = folder / f"{command}.yaml", folder / "took.json", folder / "train.log"
    config.write_text(yaml.safe_dump(loads(dumps(settings)), sort_keys=False), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "rankalign.recipes.paper.metered",
        str(took),
        command,
        "--config",
        str(config),
        "--json",
    ]
    with log.open("wb") as errors, tempfile.TemporaryFile() as out:  # a pipe that nobody reads meanwhile could fill up
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            pass_fds=(lock.handle,),
            preexec_fn=stop_with_parent,
        )
        try:
            code = child.wait()
        except BaseException:
            child.kill()  # on Ctrl-C, too: it would train on unseen
            child.wait()
            raise
        out.seek(0)
        told = out.read().decode()
    if code:
        last = (read_text(log).strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{folder}: rankalign {command} failed ({code}), see {log}: {last}")
    return dict(loads(told)), dict(loads(read_text(took)))
