"""Commands at several sizes, each in a process of its own: CPU seconds, peak memory, and how both grow."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.results import ROOT


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        title: what is measured.
        command: the words of a command, run from the repository, for the folder that holds the data of one size.
        prepare: commands run before it and not measured, in their order.
        stale: names in the folder that are removed before the first of these, so that nothing is finished already.
        most: largest size that is tried; 0 for all.
        note: printed behind the figures.
        made: name in the folder of a file that is made, whose size belongs to the figures.
    """

    title: str
    command: Callable[[Path], list[str]]
    prepare: Callable[[Path], list[list[str]]] = lambda folder: []
    stale: tuple[str, ...] = ()
    most: int = 0
    note: str = ""
    made: str = ""


@dataclass(frozen=True)
class Cost:
    """What one command took.

    Attributes:
        cpu: seconds of user and system time, of the process and of those that it waited for.
        wall: seconds.
        peak: bytes resident at most, in the largest of these processes.
        failed: its exit code, or ``stopped`` where it ran into the limit; empty where it ended well.
        made: bytes of the file that the stage names.
    """

    cpu: float
    wall: float
    peak: int
    failed: str = ""
    made: int = 0


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def rankalign(*words: str) -> list[str]:
    return python("-m", "rankalign", *words)


def run(command: list[str], limit: float, log: Path) -> Cost:
    """Run a command to its end, its output into ``log``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with open(log, "ab") as out:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            os.killpg(child.pid, 9)

        timer = threading.Timer(limit, stop)
        timer.start()
        # Not `wait`, which tells nothing of what the process used.
        _, status, used = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
    failed = "stopped" if stopped.is_set() else str(child.returncode) if child.returncode else ""
    # Linux counts kilobytes.
    return Cost(used.ru_utime + used.ru_stime, time.monotonic() - began, used.ru_maxrss * 1024, failed)


def measure(stage: Stage, folder: Path, limit: float) -> Cost:
    """Prepare and run a stage on the data of one size."""
    log = folder / "log.txt"
    for name in stage.stale:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for command in stage.prepare(folder):
        if (before := run(command, limit, log)).failed:
            raise SystemExit(f"{' '.join(command)}: {before.failed}, see {log}")
    cost = run(stage.command(folder), limit, log)
    made = folder / stage.made
    return replace(cost, made=made.stat().st_size) if made.is_file() else cost


def kept(name: str, folder: Path) -> Cost | None:
    """What the folder says that the stage took there."""
    file = folder / "costs" / f"{name}.json"
    return Cost(**json.loads(file.read_text())) if file.exists() else None


def keep(name: str, folder: Path, cost: Cost) -> None:
    """Note it in the folder, but for a command that failed."""
    if cost.failed and cost.failed != "stopped":
        return
    file = folder / "costs" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(asdict(cost)))


HEADER = ("what", "size", "CPU s", "wall s", "peak MB", "CPU grows as", "peak over the smallest", "")


def line_of(stage: Stage, found: dict[int, Cost]) -> list[str]:
    """The row of a stage: a cell holds a figure a size."""
    sizes = [size for size, cost in found.items() if not cost.failed]
    seen = [
        " / ".join(f"{size:.0e}".replace("e+0", "e") for size in found),
        " / ".join(cost.failed or f"{cost.cpu:.1f}" for cost in found.values()),
        " / ".join(f"{cost.wall:.1f}" for cost in found.values()),
        " / ".join(f"{cost.peak / 1e6:.0f}" for cost in found.values()),
    ]
    grows = ratio = "-"
    if len(sizes) > 1:
        # Between the two largest sizes: at the smallest the start of Python is most of it.
        small, large = sizes[-2:]
        exponent = math.log(found[large].cpu / found[small].cpu) / math.log(large / small)
        grows, ratio = f"n^{exponent:.2f}", f"{found[large].peak / found[sizes[0]].peak:.2f}x"
    made = " / ".join(f"{cost.made / 1e6:.1f}" for cost in found.values() if cost.made)
    note = "; ".join(filter(None, (stage.note, f"{stage.made}: {made} MB" if made else "")))
    return [stage.title, *seen, grows, ratio, note]
