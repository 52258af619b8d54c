"""The runner ``processes``: batches in several processes of this machine, each with a worker of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from typing import Any

from rankalign.errors import InputError
from rankalign.stages.stage import Batch, Worker

AHEAD = 4  # batches a process that wait for it: enough to keep it busy, few enough to hold
_worker: Worker


def run_in_processes(worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run batches in ``workers`` processes (0: one a processor), and yield them in their order.

    Raises:
        InputError: what a worker says is the user's to mend; it cannot be sent to another process, or one of them died.
    """
    count = min(workers or len(os.sched_getaffinity(0)), len(batches))
    try:
        ForkingPickler.dumps(worker)
    except Exception as error:  # it refuses with errors of several kinds
        raise InputError(
            f"{worker.name!r} cannot be sent to other processes ({error}); name its function as file.py:name"
        ) from None
    # Not forked: threads of libraries that are loaded already would hold their locks for ever in a copy.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, spawn, _start, (worker,)) as pool:
        waiting: deque[tuple[Batch, Future[list[Any]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_run, list(batch))))
                if len(waiting) >= AHEAD * count:
                    done, values = waiting.popleft()
                    yield done, values.result()
            while waiting:
                done, values = waiting.popleft()
                yield done, values.result()
        except BrokenProcessPool:
            raise InputError(
                f"{worker.name!r}: one of {count} processes died, perhaps for want of memory; try fewer"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(worker: Worker) -> None:
    global _worker
    _worker = worker


def _run(batch: list[Any]) -> list[Any]:
    return _worker(batch)
