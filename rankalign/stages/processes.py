"""The runner ``processes``: batches in several processes of this machine, each with a worker of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from rankalign.errors import InputError
from rankalign.stages.stage import Batch, Worker

AHEAD = 4  # batches a process that wait for it: enough to keep it busy, few enough to hold
_worker: Worker


def run_in_processes(worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run batches in ``workers`` processes (0: one a processor), and yield them in their order.

    Where there are GPUs each process gets its own, or as many as its worker says in ``gpus``, and there are no more
    processes than that allows.

    Raises:
        InputError: what a worker says is the user's to mend; it cannot be sent to another process, or one of them died.
    """
    cards = _cards(getattr(worker, "gpus", 1))
    count = min(workers or len(cards) or len(os.sched_getaffinity(0)), len(batches), len(cards) or len(batches))
    try:
        ForkingPickler.dumps(worker)
    except Exception as error:  # it refuses with errors of several kinds
        raise InputError(
            f"{worker.name!r} cannot be sent to other processes ({error}); name its function as file.py:name"
        ) from None
    # Not forked: threads of libraries that are loaded already would hold their locks for ever in a copy.
    spawn = multiprocessing.get_context("spawn")
    # By turns, so that each process takes the next.
    turns = spawn.Queue()
    for some in cards[:count]:
        turns.put(some)
    with ProcessPoolExecutor(count, spawn, _start, (worker, turns if cards else None)) as pool:
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


def _cards(each: int) -> list[str]:
    """The GPUs of each process, ``each`` of them, as ``CUDA_VISIBLE_DEVICES`` names them; none where there are none."""
    torch: Any = sys.modules.get("torch")  # which a worker with a model has imported by now
    seen = torch.cuda.device_count() if torch else 0  # counting starts nothing on them
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or map(str, range(seen))
    found = list(names)[:seen]
    return [",".join(found[i : i + each]) for i in range(0, len(found) - each + 1, each)]


def _start(worker: Worker, turns: Any) -> None:
    global _worker
    _worker = worker
    if turns is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = turns.get()  # read when the first tensor goes there
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Go when whoever started this process is killed: its queue would be waited on for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run(batch: list[Any]) -> list[Any]:
    return _worker(batch)
