"""Batches of a stage on the processes that train one model together: the first leads, all compute.

The batches are those of one process, so the bytes are, too: each process computes whole ones. Only the first reads and
writes; what the others are to compute, it sends them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from rankalign.errors import InputError
from rankalign.stages.stage import Batch, Worker, run_here

Find = Callable[[str], Worker]
"""Gives each process its own copy of a worker, by its key."""
END = "end"


def lead(key: str, worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run batches on all processes, as many at once as there are, and yield them in their order. A runner.

    Args:
        key: by which the others find the same worker.
        worker: this process's.
        batches: all of them.
        workers: is not read; who computes was decided when the processes were started.

    Raises:
        InputError: what one of the processes has to say.
    """
    count = PartialState().num_processes
    for start in range(0, len(batches), count):
        some = [list(batches[i]) for i in range(start, min(start + count, len(batches)))]
        broadcast_object_list([(key, some)])
        shares = _compute(worker, some)
        if failed := next((share for share in shares if isinstance(share, str)), None):
            raise InputError(failed)
        yield from zip(some, shares, strict=False)


def lead_alone(worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run batches in this process, and tell the others with each that it is at work: they would wait for a message no
    longer than for one of the training's. A runner."""
    for batch in batches:
        tick()
        yield from run_here(worker, [batch])


def tick() -> None:
    """Tell the other processes that the first is at work, so that they do not give it up."""
    broadcast_object_list([("", [])])


def dismiss(well: bool) -> None:
    """Let the other processes go on to what they do without being told.

    Args:
        well: False where the first has failed; the others then stop as well.
    """
    broadcast_object_list([(END, [well])])


def follow(find: Find) -> None:
    """Compute what the first process sends, until it lets this one go.

    Raises:
        InputError: the first process has failed.
    """
    while True:
        key, some = broadcast_object_list([None])[0]
        if key == END:
            break
        if key:
            _compute(find(key), some)
    if not some[0]:
        raise InputError("stopped, for the first process has failed and says why")


def _compute(worker: Worker, some: Sequence[Batch]) -> list[Any]:
    """The values of each batch, in each process; a text where computing it failed."""
    number = PartialState().process_index
    mine: Any = None
    try:
        mine = worker(some[number]) if number < len(some) else []
    except InputError as error:
        mine = str(error)
    except Exception as error:  # told as well, for the others would wait for this one's values
        traceback.print_exc()
        mine = f"process {number} failed: {type(error).__name__}: {error}"
    return list(gather_object([mine]))
