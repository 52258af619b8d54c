"""What sampling and scoring have in common: a pass over batches that leaves one output, resumable, shared out at will.

Work items are keyed ``(name, record id, digest of the record)``, so that a changed input keeps what is done. They go
into the journal batch by batch; from the whole of them the output is put together, so neither the order in which they
came nor who computed them leaves a trace in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rankalign.data.records import CandidateSet, to_dict, write
from rankalign.data.spool import View
from rankalign.errors import InputError
from rankalign.progress import Progress
from rankalign.registry import Entry, Registry
from rankalign.stages.counts import Counts
from rankalign.stages.shards import Batch as Batch
from rankalign.stages.shards import Shard, write_items
from rankalign.storage import manifest
from rankalign.storage.files import sync_directory
from rankalign.storage.journal import FORMAT, Calls, Journal, Remembering, content_digest, differences
from rankalign.storage.journal_items import Key
from rankalign.storage.jsonl import dumps, loads
from rankalign.storage.spreadsheet import check_lines

# What was computed for a record by the policy or scorer of that name.
Find = Callable[[str, CandidateSet], Any]
Assemble = Callable[[Find], Iterator[CandidateSet]]


class Worker(Protocol):
    """Turns a batch of records into one JSON-like value a record.

    It must survive ``pickle`` before its first batch: the runner ``ray`` sends it to other processes. One that has a
    ``runner`` of its own, as a function, is run by that, whatever the stage is told, and says by ``stays`` whether it
    is itself that runs.
    """

    name: str

    def __call__(self, batch: Batch) -> list[Any]:
        """The values of a batch, in its order."""
        ...


ON_ERROR = ("stop", "skip")
# Each runner is called with (worker, batches, how many workers; 0 for its own choice) and yields (batch, values) as
# they come, in any order.
RUNNERS = Registry(
    "runner",
    {
        "local": Entry("rankalign.stages.stage:run_here", "this process, batch after batch"),
        "processes": Entry("rankalign.stages.processes:run_in_processes", "several processes on this machine"),
        "ray": Entry("rankalign.stages.ray_runner:run_on_ray", "Ray Data: actors on one or many machines", "ray"),
    },
)


def run_here(worker: Worker, batches: Sequence[Batch], workers: int = 0) -> Iterator[tuple[Batch, list[Any]]]:
    """Run every batch in this process.

    Raises:
        InputError: more than one worker is asked for.
    """
    if workers > 1:
        raise InputError("runner 'local' is one process: use --num_proc, --runner ray or --shard for several")
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

    def run(self, ledger: Ledger, progress: Progress) -> None:
        """Do every batch of which anything is missing. It is computed whole even so: batch mates change the last bits
        of a matrix product, and a resumed run must repeat the first one's bytes."""
        name, own = self.worker.name, getattr(self.worker, "runner", None)
        todo = View[Batch](self.batches, ledger.unfinished(name, self.batches))
        here = getattr(self.worker, "stays", False) if own else self.scale.runner == "local"
        if ledger.skip and not here:
            raise InputError(
                f"on_error: runner {self.scale.runner!r} keeps no calls; skip failed ones with runner local"
            )
        if todo and isinstance(self.worker, Remembering) and here:
            self.worker.remember(ledger.calls(name))
        runner, workers = (own, 0) if own else (RUNNERS.load(self.scale.runner), self.scale.workers)
        for batch, values in runner(self.worker, todo, workers) if todo else ():
            fresh = ledger.missing(name, batch)
            ledger.add(name, batch, values)
            progress.add(fresh)
        ledger.take(name, self.batches)


FAILED = "failed"
FEW = 2
"""Where more prompts than these fail and none does not, the fault is not theirs."""


def partial(value: Any, failures: list[dict[str, Any]]) -> Any:
    """An item some of whose calls failed: the output gets what there is, and the next run may ask for the rest."""
    return {"value": value, FAILED: failures} if failures else value


class Ledger:
    """The items of one run: those in its journal, and those that lack something and are not put there.

    Args:
        journal: the journal.
        skip: calls that fail for good are left out and counted; else the first one ends the run.
        retry: ask again what failed in an earlier run.

    Attributes:
        taken: by name, the batches whose items are all there.
        failed: each failed call, ``{"name", "id", "reason", "tries", ...}``.
    """

    def __init__(self, journal: Journal, skip: bool = False, retry: bool = False) -> None:
        self.journal, self.skip, self.retry = journal, skip, retry
        self.taken: dict[str, Sequence[Batch]] = {}
        self.failed: list[dict[str, Any]] = []
        self._partial: dict[Key, Any] = {}
        self._batch: Batch = ()  # the last one, whose digests are kept: it is asked about several times in a row
        self._digests: dict[int, str] = {}

    def calls(self, name: str) -> Calls:
        """The calls of a policy or judge."""
        return Calls(self.journal, name, self.skip, self.retry)

    def missing(self, name: str, batch: Batch) -> int:
        """How many records of a batch have no item yet."""
        if batch is not self._batch:
            self._batch, self._digests = batch, {}
        return sum(self._key(name, record) not in self.journal.done for record in batch)

    def unfinished(self, name: str, batches: Sequence[Batch]) -> Sequence[int]:
        """Which batches lack items; without an item in the journal none needs to be read to know that."""
        if not self.journal.done:
            return range(len(batches))
        return array("Q", (number for number, batch in enumerate(batches) if self.missing(name, batch)))

    def add(self, name: str, batch: Batch, values: Sequence[Any]) -> None:
        """Put the items of a batch into the journal; those that lack something stay in memory."""
        keyed = [(self._key(name, record), value) for record, value in zip(batch, values, strict=True)]
        lacking = {key: value for key, value in keyed if isinstance(value, dict) and FAILED in value}
        self.journal.append([(key, value) for key, value in keyed if key not in lacking])
        self._partial |= lacking

    def take(self, name: str, batches: Sequence[Batch]) -> None:
        """Note that all items of these batches are there, and what failed."""
        self.taken[name] = batches
        for record in itertools.chain.from_iterable(batches) if self._partial else ():
            key = self._key(name, record)
            if key not in self.journal.done:
                self.failed += [{"name": name, "id": record.id, **each} for each in self._partial[key][FAILED]]

    def find(self, name: str, record: CandidateSet) -> Any:
        """The item of a record."""
        key = self._key(name, record)
        return self.journal.done[key] if key in self.journal.done else self._partial[key]["value"]

    def _key(self, name: str, record: CandidateSet) -> Key:
        if self.journal.old:  # version 0.1 had no digests
            return (name, record.id)
        kept = self._digests.get(id(record))
        if kept is None:
            told = to_dict(record)
            for response in told["responses"]:
                response.pop("scores", None)  # no engine and no scorer sees them
            kept = content_digest(told)
            if any(record is mate for mate in self._batch):  # which holds it, so that no other gets its id()
                self._digests[id(record)] = kept
        return (name, record.id, kept)


def run_plans(what: str, plans: list[Plan], ledger: Ledger) -> None:
    """Run plans one after the other; each is dropped when it is done, so that only one model is in memory."""
    total = sum(plan.total for plan in plans)
    done = sum(
        len(batch) - ledger.missing(plan.worker.name, batch)
        for plan in plans
        for batch in (plan.batches if ledger.journal.done else ())
    )
    with Progress(what, total, "prompt", done=done) as progress:
        while plans:
            plans.pop(0).run(ledger, progress)


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
        inputs: the settings that say which records there are; a begun run goes on though they change.
        on_error: ``stop`` at the first call that fails for good, or ``skip`` such calls and count them.
        retry_failed: ask again what was skipped, in a finished run too.
    """

    name: str
    source: Path
    output: Path
    settings: dict[str, Any]
    shard: str = ""
    overwrite: bool = False
    inputs: tuple[str, ...] = ()
    on_error: str = "stop"
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise InputError(f"on_error: {self.on_error!r} is none of {', '.join(ON_ERROR)}")
        check_lines(self.output)

    @property
    def target(self) -> Path:
        """The file that this process writes."""
        return Shard.parse(self.shard).path(self.output) if self.shard else self.output

    def run(
        self,
        work: Callable[[Ledger], None],
        assemble: Assemble,
        facts: Callable[[], dict[str, Any]] = dict,
        read: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Do the work unless it is finished.

        Args:
            work: takes every item into the ledger.
            assemble: makes the output's records of the items, in order.
            facts: more for the manifest, asked for when the work is done.
            read: reads the input, so that what is wrong with it is said before that it is another one.

        Returns:
            Counts for the caller to show.

        Raises:
            InputError: another process is at it, the settings differ, or it cannot be written.
        """
        path = self.target.with_name(self.target.name + ".journal")
        if not self.overwrite and not self._goes_on(path) and self._is_finished(read, path):
            return self._nothing_to_do(path)
        started = time.time()
        with Journal(path, self._header(), fresh=self.overwrite, older=self.settings) as journal:
            if self.overwrite:  # not before the journal's lock is ours
                _remove(self.target)
            ledger = Ledger(journal, self.on_error == "skip" or self.retry_failed, self.retry_failed)
            work(ledger)
            found = {"seconds": round(time.time() - started, 1), **facts(), **self._failures(ledger)}
            counts = self._part(ledger, found) if self.shard else self._whole(assemble(ledger.find), found)
            if FAILED not in found:  # else it holds what need not be asked again
                path.unlink(missing_ok=True)
            sync_directory(self.output.parent)  # the removal, too, or a power cut would bring the journal back
        told = {**found, FAILED: len(found[FAILED])} if FAILED in found else found
        return {"output": str(self.target), "already_finished": False, **counts, **told}

    def _is_finished(self, read: Callable[[], object], journal: Path) -> bool:
        try:
            finished = manifest.is_finished(self.target, self.settings)
        except InputError:
            read()
            raise
        # A kill between output and manifest leaves the journal, too.
        if not finished and not journal.exists() and self.target.is_file() and self.target.stat().st_size:
            raise InputError(
                f"{self.target} is there, and no manifest says that {self.name} made it; "
                "name another output or replace it with --overwrite"
            )
        return finished

    def _header(self) -> dict[str, Any]:
        return {FORMAT: 2, **{key: value for key, value in self.settings.items() if key not in self.inputs}}

    def _goes_on(self, journal: Path) -> bool:
        """Whether a finished output lacks what failed, and is to get it: asked for, or because its input changed."""
        found = manifest.read(self.target) if self.target.exists() else None
        if not found or not found.get(FAILED):
            return False
        changed = {key for key in self.settings if differences(found["settings"].get(key), self._plain[key])}
        going = changed <= {*self.inputs} if changed else self.retry_failed
        if going and not journal.exists():
            raise InputError(f"{journal} is gone, and with it what {self.target} lacks; start over with --overwrite")
        return going

    @property
    def _plain(self) -> dict[str, Any]:
        """The settings as a manifest has them."""
        return dict(loads(dumps(self.settings)))

    def _nothing_to_do(self, journal: Path) -> dict[str, Any]:
        skipped = len((manifest.read(self.target) or {}).get(FAILED, ()))
        told = f"; {skipped} calls failed and were skipped, --retry_failed asks again" if skipped else ""
        print(f"{self.target} is finished already with these settings: nothing to do{told}", file=sys.stderr)
        if not skipped:
            journal.unlink(missing_ok=True)  # a kill can fall between the manifest and this
        return {"output": str(self.target), "already_finished": True, **({FAILED: skipped} if skipped else {})}

    def _failures(self, ledger: Ledger) -> dict[str, Any]:
        """What failed, for the manifest; said on stderr.

        Raises:
            InputError: all failed, so that it is the server or the settings and not a prompt.
        """
        failed = ledger.failed
        if not failed:
            return {}
        kept = any(len(ledger.calls(name)) for name in ledger.taken)
        first = f"{failed[0]['name']}, {failed[0]['id']}: {failed[0]['reason']}"
        if not kept and len({each["id"] for each in failed}) > FEW:
            raise InputError(f"{self.target}: all {len(failed)} calls failed, the first one: {first}")
        print(f"{len(failed)} calls failed and were skipped, the first one: {first}", file=sys.stderr)
        print("they are listed in the manifest; --retry_failed asks them again", file=sys.stderr)
        return {FAILED: failed}

    def _whole(self, sets: Iterator[CandidateSet], facts: dict[str, Any]) -> dict[str, Any]:
        counts = Counts()
        return self._finish(lambda: write(self.output, map(counts.add, sets)), counts.as_dict, facts)

    def _part(self, ledger: Ledger, facts: dict[str, Any]) -> dict[str, Any]:
        told = {**facts, "shard": self.shard}
        count = sum(len(batch) for batches in ledger.taken.values() for batch in batches)
        return self._finish(lambda: write_items(self.target, ledger.taken, ledger.find), lambda: {"items": count}, told)

    def _finish(
        self, put: Callable[[], object], count: Callable[[], dict[str, Any]], facts: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            put()
            counts = count()
            # Last, and before the journal goes: only a manifest says that the output is whole.
            manifest.write(self.target, self.name, self.settings, [self.source], [self.target], counts=counts, **facts)
        except InputError as error:
            raise InputError(f"{error}; all that was computed is safe, run the same command again") from None
        return counts


def _remove(target: Path) -> None:
    for path in (manifest.path_for(target), target):  # in this order a kill leaves no manifest of a file that is gone
        path.unlink(missing_ok=True)
