"""Seeds beside each other: each in a process of its own, with its share of the processors.

Seeds share nothing but the prompts and the start model, so that two processes of one thread do what one of two threads
does, in less time: much of a small model's work runs on one thread.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from rankalign.config import build
from rankalign.errors import InputError
from rankalign.recipes.apart import stop_with_parent
from rankalign.recipes.paper.child import Inherited, Lock
from rankalign.recipes.paper.settings import TableConfig
from rankalign.recipes.paper.unit import Bench, Unit
from rankalign.storage.jsonl import dumps, loads


def run_units(units: Sequence[Unit]) -> int:
    """Run units one after the other; how many there was something to do for."""
    return sum(unit.run() for unit in units)


def run_apart(config: TableConfig, lock: Lock) -> int:
    """Run all seeds, ``config.jobs`` at a time; how many units there was something to do for.

    Raises:
        InputError: a unit failed; the other seeds are stopped, and what they had finished stays.
    """
    running: list[subprocess.Popen[bytes]] = []
    threads = str(max(1, len(os.sched_getaffinity(0)) // config.jobs))

    def run_seed(seed: int) -> int:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(seed), str(lock.handle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(lock.handle,),
            preexec_fn=stop_with_parent,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )
        running.append(child)
        out, _ = child.communicate(dumps(dataclasses.asdict(config)).encode())
        told = dict(loads(out.decode())) if out else {"error": f"ended with {child.returncode}"}
        if "error" in told:
            raise InputError(f"seed {seed}: {told['error']}")
        return int(told["ran"])

    with ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(run_seed, seed) for seed in config.seeds]
        try:
            return sum(future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.terminate()  # it stops its own training before it ends
            raise


def main(seed: int, handle: int) -> int:
    """The work of one process: the units of a seed, of the settings on its standard input."""
    signal.signal(signal.SIGTERM, _leave)
    config = build(TableConfig, loads(sys.stdin.read()), "the table")
    told: dict[str, Any]
    try:
        bench = Bench(config, Inherited(handle))
        told = {"ran": run_units([Unit(bench, row, seed) for row in config.in_order()])}
    except InputError as error:
        told = {"error": str(error)}
    print(dumps(told))
    return int("error" in told)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
