"""What sampling and scoring have in common: a pass over batches that leaves one output, resumable, shared out at will.

Work items are keyed ``(name, record id)``. They go into the journal batch by batch; from the whole of them the output
is put together, so neither the order in which they came nor who computed them leaves a trace in it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rankalign.data.records import CandidateSet, write
from rankalign.errors import InputError
from rankalign.progress import Progress
from rankalign.registry import Entry, Registry
from rankalign.scorers import summary
from rankalign.stages.shards import Shard, write_items
from rankalign.storage import manifest
from rankalign.storage.files import sync_directory
from rankalign.storage.journal import Journal, Key

Items = Mapping[Key, Any]
Batch = Sequence[CandidateSet]
Assemble = Callable[[Items], list[CandidateSet]]


class Worker(Protocol):
    """Turns a batch of records into one JSON-like value a record.

    It must survive ``pickle`` before its first batch: the runner ``ray`` sends it to other processes.
    """

    name: str

    def __call__(self, batch: Batch) -> list[Any]:
        """The values of a batch, in its order."""
        ...


# Each runner is called with (worker, batches, how many workers; 0 for its own choice) and yields (batch, values) as
# they come, in any order.
RUNNERS = Registry(
    "runner",
    {
        "local": Entry("rankalign.stages.stage:run_here", "this process, batch after batch"),
        "ray": Entry("rankalign.stages.ray_runner:run_on_ray", "Ray Data: actors on one or many machines", "ray"),
    },
)


def run_here(worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run every batch in this process.

    Raises:
        InputError: more than one worker is asked for.
    """
    if workers > 1:
        raise InputError("runner 'local' is one process: use --runner ray for several workers, or --shard")
    for batch in batches:
        yield batch, worker(batch)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Which part of a stage to do, and with whom.

    Attributes:
        shard: ``i/n`` to do every n-th batch from the i-th (from 0), or empty for all.
        runner: a name in :data:`RUNNERS`.
        workers: how many the runner may use; 0 leaves it to the runner.
    """

    shard: str = ""
    runner: str = "local"
    workers: int = 0

    def plan(self, worker: Worker, batches: Sequence[Batch]) -> Plan:
        """The part of ``batches`` that is to be done here."""
        part = Shard.parse(self.shard).part(batches) if self.shard else batches
        return Plan(worker, part, self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One worker and the batches it is to do."""

    worker: Worker
    batches: Sequence[Batch]
    scale: Scale

    @property
    def total(self) -> int:
        """How many records."""
        return sum(map(len, self.batches))

    def missing(self, batch: Batch, journal: Journal) -> int:
        """How many records of a batch have no item yet."""
        return sum((self.worker.name, record.id) not in journal.done for record in batch)

    def run(self, journal: Journal, progress: Progress) -> None:
        """Do every batch of which anything is missing. It is computed whole even so: batch mates change the last bits
        of a matrix product, and a resumed run must repeat the first one's bytes."""
        todo = [batch for batch in self.batches if self.missing(batch, journal)]
        runner = RUNNERS.load(self.scale.runner)
        for batch, values in runner(self.worker, todo, self.scale.workers) if todo else ():
            fresh = self.missing(batch, journal)
            name = self.worker.name
            journal.append([((name, record.id), value) for record, value in zip(batch, values, strict=True)])
            progress.add(fresh)


def run_plans(what: str, plans: list[Plan], journal: Journal) -> None:
    """Run plans one after the other; each is dropped when it is done, so that only one model is in memory."""
    total = sum(plan.total for plan in plans)
    done = sum(plan.total - sum(plan.missing(batch, journal) for batch in plan.batches) for plan in plans)
    with Progress(what, total, "prompt", done=done) as progress:
        while plans:
            plans.pop(0).run(journal, progress)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pass over one input that leaves one output, or one shard of it.

    Attributes:
        name: ``sample`` or ``score``.
        source: the input.
        output: the whole output.
        settings: everything the output depends on; not who computes it, nor in how many parts.
        shard: ``i/n`` or empty.
        overwrite: replace a finished or half-finished output.
    """

    name: str
    source: Path
    output: Path
    settings: dict[str, Any]
    shard: str = ""
    overwrite: bool = False

    @property
    def target(self) -> Path:
        """The file that this process writes."""
        return Shard.parse(self.shard).path(self.output) if self.shard else self.output

    def run(self, work: Callable[[Journal], None], assemble: Assemble, **facts: Any) -> dict[str, Any]:
        """Do the work unless it is finished.

        Args:
            work: puts every item into the journal.
            assemble: makes the output's records of all items.
            **facts: more for the manifest.

        Returns:
            Counts for the caller to show.

        Raises:
            InputError: another process is at it, the settings differ, or it cannot be written.
        """
        path = self.target.with_name(self.target.name + ".journal")
        if not self.overwrite and manifest.is_finished(self.target, self.settings):
            path.unlink(missing_ok=True)  # a kill can fall between the manifest and this
            print(f"{self.target} is finished already with these settings: nothing to do", file=sys.stderr)
            return {"output": str(self.target), "already_finished": True}
        started = time.time()
        with Journal(path, self.settings, fresh=self.overwrite) as journal:
            if self.overwrite:  # not before the journal's lock is ours
                _remove(self.target)
            work(journal)
            facts = {"seconds": round(time.time() - started, 1), **facts}
            counts = self._part(journal.done, facts) if self.shard else self._whole(assemble(journal.done), facts)
            path.unlink(missing_ok=True)
            sync_directory(self.output.parent)
        return {"output": str(self.target), "already_finished": False, **counts, **facts}

    def _whole(self, sets: Sequence[CandidateSet], facts: dict[str, Any]) -> dict[str, Any]:
        return self._finish(lambda: write(self.output, sets), _counts(sets), facts)

    def _part(self, items: Items, facts: dict[str, Any]) -> dict[str, Any]:
        told = {**facts, "shard": self.shard}
        return self._finish(lambda: write_items(self.target, items), {"items": len(items)}, told)

    def _finish(self, put: Callable[[], object], counts: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        try:
            put()
            manifest.write(self.target, self.name, self.settings, [self.source], [self.target], counts=counts, **facts)
        except InputError as error:
            raise InputError(f"{error}; all that was computed is safe, run the same command again") from None
        return counts


def _remove(target: Path) -> None:
    for path in (manifest.path_for(target), target):
        path.unlink(missing_ok=True)


def _counts(sets: Sequence[CandidateSet]) -> dict[str, Any]:
    responses = [response for record in sets for response in record.responses]
    scores = [value for response in responses for value in response.scores.values()]
    return {
        "prompts": len(sets),
        "responses": sum(response.count for response in responses),
        "distinct": len(responses),
        "unfinished": sum(not response.finished for response in responses),
        "empty": sum(response.count for response in responses if not response.text.strip()),
        "scores": sum(value is not None for value in scores),
        "missing_scores": sum(value is None for value in scores),
        **summary(sets),
    }
