"""The runner ``ray``: batches through Ray Data, on actors that hold one engine or scorer each.

The driver keeps the journal; batches are the single process's, so the records that come out are the same. A cluster is
used where ``RAY_ADDRESS`` names one; its machines need the same rankalign, models and files under the same paths.
Otherwise Ray is started on this machine, on the loopback alone, without dashboard and usage reports.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

LOCAL = "RAY_ADDRESS" not in os.environ
if LOCAL and "ray" not in sys.modules:  # Ray reads these when it is imported; who did that before us has chosen
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # or it listens on every interface, on Linux too
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default, said aloud: it warns where it is not
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray  # noqa: E402
import ray.data  # noqa: E402

from rankalign.data.records import parse, to_dict  # noqa: E402
from rankalign.errors import InputError  # noqa: E402
from rankalign.stages.stage import Batch, Worker  # noqa: E402
from rankalign.storage.jsonl import dumps, loads  # noqa: E402


def run_on_ray(worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run batches on ``workers`` actors (0: one a GPU, or one a machine where there are none), as they come.

    Raises:
        InputError: what a worker says is the user's to mend.
    """
    _start()
    rows = [{"number": n, "records": dumps([to_dict(r) for r in batch])} for n, batch in enumerate(batches)]
    count, cpus, gpus = _pool(workers)
    # A block a batch: blocks are what Ray shares out, and by default one actor could get them all.
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(worker,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in results.iter_rows():
        if row["error"]:
            raise InputError(str(row["error"]))
        yield batches[int(row["number"])], loads(str(row["values"]))


class _Actor:
    """One worker on its actor. Records and values travel as JSON, which keeps every number exactly."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        values, error = "", ""
        try:
            values = dumps(self.worker([parse(row) for row in loads(str(block["records"][0]))]))
        except InputError as mistake:  # Ray would wrap it into a page of tracebacks
            error = str(mistake)
        return {"number": [int(block["number"][0])], "values": [values], "error": [error]}


def _start() -> None:
    if ray.is_initialized():
        return
    if LOCAL:
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    else:
        ray.init(logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts prompts
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _pool(workers: int) -> tuple[int, float, float]:
    """How many workers there are to be, and the CPUs and GPUs that each may have."""
    cluster: Any = ray  # whose functions are not annotated
    there = cluster.cluster_resources()
    cpus, gpus = there.get("CPU", 1), there.get("GPU", 0)
    count = workers or int(gpus) or len(cluster.nodes())
    return count, cpus // count or cpus / count, gpus // count or gpus / count  # Ray takes parts of one, too
