"""Parts of one stage, done by processes that share nothing but a folder: ``OUTPUT.shard-0-of-4`` and its manifest.

A shard is every n-th batch of the whole run, so the batches, and with them the bytes, are those of one process. Its
file holds finished work items, one JSON line ``{"key": [name, record id], "value": ...}`` each; only together do the
shards make records.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rankalign.data.records import Checker
from rankalign.errors import InputError
from rankalign.storage import manifest
from rankalign.storage.files import atomic_writer
from rankalign.storage.journal import Key, differences
from rankalign.storage.jsonl import dumps, read_rows

T = TypeVar("T")


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


def write_items(path: Path, items: Mapping[Key, Any]) -> None:
    """Write finished work items, sorted by key."""
    with atomic_writer(path) as out:
        for key in sorted(items):
            out.write(dumps({"key": list(key), "value": items[key]}).encode("utf-8") + b"\n")


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
    items: dict[Key, Any]
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
    items: dict[Key, Any] = {}
    for shard in shards:
        _add(items, shard, output)
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


def _add(items: dict[Key, Any], shard: Shard, output: Path) -> None:
    path = shard.path(output)
    if not path.stat().st_size:  # more shards than batches
        return
    for line, row in read_rows(path):
        check = Checker(path, line)
        key = tuple(check.array(check.need(row, "key"), "key"))
        if key in items:
            raise check.fail("key", f"{' '.join(map(str, key))} stands in another shard of {output} as well")
        items[key] = check.need(row, "value")
