"""Parts of one stage, done by processes that share nothing but a folder: ``OUTPUT.shard-0-of-4`` and its manifest.

A shard is every n-th batch of the whole run, so the batches, and with them the bytes, are those of one process. Its
file holds finished work items, one JSON line ``{"key": [name, record id], "value": ...}`` each; only together do the
shards make records.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from rankalign.data.records import CandidateSet, Checker
from rankalign.errors import InputError
from rankalign.storage import manifest
from rankalign.storage.files import BLOCK, atomic_writer, decode
from rankalign.storage.journal import differences
from rankalign.storage.journal_items import Key
from rankalign.storage.jsonl import dumps, loads, object_at
from rankalign.storage.places import ABSENT, Places

T = TypeVar("T")
Batch = Sequence[CandidateSet]
_OFFSET = 40  # bits of a place in a file, behind the number of the shard


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``of`` parts."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from ``i/n``.

        Raises:
            InputError: not two whole numbers with 0 <= i < n.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        index, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if index >= of:
            last = f"; the last of {of} shards is {of - 1}/{of}" if of else ""
            raise InputError(f"shard {text!r}: write i/n, where i counts from 0: 0/2 and 1/2 are the halves{last}")
        return cls(index, of)

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def part(self, batches: Sequence[T]) -> Sequence[T]:
        """This shard's batches of all."""
        # Interleaved: engines put the long prompts first, and each shard gets some.
        return batches[self.index :: self.of]

    def path(self, output: Path) -> Path:
        """Where this shard of ``output`` lies."""
        return output.with_name(f"{output.name}.shard-{self.index}-of-{self.of}")


def write_items(path: Path, taken: Mapping[str, Sequence[Batch]], find: Callable[[str, CandidateSet], Any]) -> None:
    """Write the finished work items of some batches by name, sorted by name and record id."""
    with atomic_writer(path) as out:
        for name in sorted(taken):
            batches = taken[name]
            order = sorted((record.id, n, k) for n, batch in enumerate(batches) for k, record in enumerate(batch))
            held: int = -1
            batch: Batch = ()
            for ident, number, place in order:
                if number != held:  # ids mostly rise along the file, so the next one is mostly of the same batch
                    held, batch = number, batches[number]
                row = {"key": [name, ident], "value": find(name, batch[place])}
                out.write(dumps(row).encode("utf-8") + b"\n")


class ShardItems(Mapping[Key, Any]):
    """Values by (name, record id) of all shards, each read from its file when it is asked for."""

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        self._places = Places()

    def add(self, path: Path, output: Path) -> None:
        """Take a shard's items.

        Raises:
            RecordError: a line is damaged, or an item stands in an earlier shard, too.
        """
        source = open(path, "rb", BLOCK)  # noqa: SIM115  (read as long as this object lives)
        self._files.append(source)
        offset = 0
        for line, raw in enumerate(source, start=1):
            check, row = Checker(path, line), object_at(path, line, decode(path, line, raw.rstrip(b"\n")))
            key = tuple(check.array(check.need(row, "key"), "key"))
            check.need(row, "value")
            if key in self._places:
                raise check.fail("key", f"{' '.join(map(str, key))} stands in another shard of {output} as well")
            self._places.put(key, len(self._files) - 1 << _OFFSET | offset)
            offset += len(raw)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: Key) -> Any:
        if (place := self._places.find(key)) == ABSENT:
            raise KeyError(key)
        source = self._files[place >> _OFFSET]
        source.seek(place & (1 << _OFFSET) - 1)
        return loads(source.readline().decode("utf-8"))["value"]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Key]:
        for source in self._files:
            source.seek(0)
            yield from [tuple(loads(raw.decode("utf-8"))["key"]) for raw in source]


@dataclasses.dataclass(frozen=True)
class Collected:
    """All shards of one output, checked and joined.

    Attributes:
        stage: name of the stage.
        settings: the settings that all of them share.
        source: the stage's input, unchanged since.
        items: value by key.
        seconds: what they took, summed.
        count: how many there were.
        failed: the calls that failed and were skipped.
        skipped_invalid: bad records of the input that were left out.
    """

    stage: str
    settings: dict[str, Any]
    source: Path
    items: ShardItems
    seconds: float
    count: int
    failed: list[dict[str, Any]]
    skipped_invalid: int = 0


def collect(output: Path) -> Collected:
    """Read the shards of ``output``.

    Raises:
        InputError: one is missing, unfinished, changed, stands twice, was made with other settings than the first or
            holds another's items; or the stage's input has changed.
    """
    shards = _expected(output)
    contents = [_finished(shard, output) for shard in shards]
    first = contents[0]
    for shard, content in zip(shards, contents, strict=True):
        if changed := differences(first["settings"], content["settings"]):
            raise InputError(
                f"shard {shard} was made with other settings than shard {shards[0]} ({'; '.join(changed[:4])}); "
                f"run it again with the same ones, --shard {shard} and --overwrite"
            )
    told = manifest.path_for(shards[0].path(output))
    for entry in manifest.changed_files(told, first, ("input",)):
        raise InputError(f"{entry['path']} {entry['reason']} since the shards of {output} were made from it")
    items = ShardItems()
    for shard in shards:
        items.add(shard.path(output), output)
    failed = [each for content in contents for each in content.get("failed", ())]
    seconds = round(sum(content["seconds"] for content in contents), 1)
    source = next(entry.path for entry in manifest.entries(told, first) if entry.role == "input")
    skipped = first.get("skipped_invalid", 0)  # each shard reads the whole input, and counts all of it
    return Collected(first["stage"], first["settings"], source, items, seconds, len(shards), failed, skipped)


def _expected(output: Path) -> list[Shard]:
    """The shards that make up ``output``, by what lies beside it (journals of unfinished ones included)."""
    pattern = re.compile(re.escape(output.name) + r"\.shard-(\d+)-of-(\d+)(\.journal)?")
    names = output.parent.iterdir() if output.parent.is_dir() else ()
    found = [match for path in names if (match := pattern.fullmatch(path.name))]
    there = sorted({Shard(int(match[1]), int(match[2])) for match in found}, key=lambda s: (s.of, s.index))
    if not there:
        raise InputError(f"{output} has no shards: make them with `rankalign sample` or `score` and --shard i/n")
    if there[0].of != there[-1].of:
        raise InputError(
            f"{output} has shards of several divisions ({', '.join(map(str, there))}): delete those that are not meant"
        )
    if there[-1].index >= there[-1].of:
        raise InputError(f"{there[-1].path(output)}: there is no shard {there[-1]}; shards count from 0")
    return [Shard(index, there[0].of) for index in range(there[0].of)]


def _finished(shard: Shard, output: Path) -> dict[str, Any]:
    """The manifest of a shard."""
    path = shard.path(output)
    content = manifest.read(path)
    if content is None or not path.exists():
        begun = path.exists() or path.with_name(path.name + ".journal").exists()
        what = "is unfinished" if begun else "is missing"
        raise InputError(f"shard {shard} of {output} {what}: run the stage with --shard {shard}")
    told = content.get("shard")
    if told != str(shard):
        raise InputError(
            f"{path} is shard {told} under another name, so shard {told} stands twice or shard {shard} is missing: "
            f"delete it and run the stage with --shard {shard}"
        )
    digests = manifest.hashes([path]).values()
    if list(digests) != list(content["outputs"].values()):
        raise InputError(f"{path} has changed since it was made: run the stage with --shard {shard} and --overwrite")
    return content
