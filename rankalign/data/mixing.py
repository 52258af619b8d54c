"""Several data sets into one, in given shares or up to given sizes, and a split that any process makes alike.

Who is taken is decided by SHA-256 of the seed and the record, never by a random generator or by Python's own hash: the
same records and the same seed give the same choice on every machine, and a larger share holds the smaller one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankalign.data.formats import Losses
from rankalign.data.ids import FreshIds
from rankalign.data.lint.whole import prompt_key
from rankalign.data.records import CandidateSet
from rankalign.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """What is taken of each source, and what is held out of the whole.

    Attributes:
        weights: each source's share of the mixture, in any unit; the mixture is as large as no record taken twice
            allows. Empty takes all.
        limits: how many records of each source at the most; one number stands for every source. Empty is no limit.
        test_size: the share of the records that is held out.
        seed: another seed makes another choice.

    Raises:
        InputError: a number makes no sense.
    """

    weights: tuple[float, ...] = ()
    limits: tuple[int, ...] = ()
    test_size: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"weights must be positive numbers, got {list(self.weights)}")
        if any(limit < 1 for limit in self.limits):
            raise InputError(f"limits must be at least 1, got {list(self.limits)}")
        if not 0 <= self.test_size < 1:
            raise InputError(f"the test size is a share from 0 to below 1, got {self.test_size}")

    def take(self, sources: Sequence[Iterable[CandidateSet]], losses: Losses) -> Iterator[CandidateSet]:
        """The chosen records, one source after the other, each in its own order; the others are counted in ``losses``.

        Raises:
            InputError: as many weights or limits as sources are needed.
        """
        if not self.weights and not self.limits:
            for source in sources:
                yield from source
            return
        lists = [list(source) for source in sources]
        for records, size in zip(lists, self.sizes([len(records) for records in lists]), strict=True):
            if left := len(records) - size:
                losses.add("records beyond a source's weight or limit", left)
            yield from self._chosen(records, size)

    def sizes(self, available: Sequence[int]) -> list[int]:
        """How many records to take of each source, from how many there are."""
        limits = self.limits * len(available) if len(self.limits) == 1 else self.limits
        for what, given in (("weights", self.weights), ("limits", limits)):
            if given and len(given) != len(available):
                raise InputError(f"{len(available)} sources need as many {what}, got {len(given)}")
        most = [min(pair) for pair in zip(available, limits, strict=True)] if limits else list(available)
        if not self.weights:
            return most
        unit = min(count / weight for count, weight in zip(most, self.weights, strict=True))
        # A product such as 0.1 * 30 may fall an ulp short of the whole number that it stands for.
        return [int(unit * weight + 1e-9) for weight in self.weights]

    def _chosen(self, records: list[CandidateSet], size: int) -> list[CandidateSet]:
        # By id and prompt: ids that are made of line numbers are the same in many files.
        first = sorted(range(len(records)), key=lambda i: self._draw(records[i].id + "\n" + prompt_key(records[i])))
        return [records[index] for index in sorted(first[:size])]

    def split(self, records: Iterable[CandidateSet]) -> tuple[list[CandidateSet], list[CandidateSet]]:
        """Those to train on and those held out, in order; records of one prompt are on one side.

        Prompts are held out one by one until their records reach the share, rounded; with ``test_size`` above 0 at
        least one.
        """
        everything = list(records)
        by_prompt: dict[str, int] = {}
        for record in everything:
            by_prompt[prompt_key(record)] = by_prompt.get(prompt_key(record), 0) + 1
        wanted = max(round(self.test_size * len(everything)), 1 if self.test_size else 0)
        held_out = set[str]()
        for prompt in sorted(by_prompt, key=self._draw):
            if wanted <= 0:
                break
            wanted -= by_prompt[prompt]
            held_out.add(prompt)
        sides: tuple[list[CandidateSet], list[CandidateSet]] = ([], [])
        for record in everything:
            sides[prompt_key(record) in held_out].append(record)
        return sides

    def _draw(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.seed}\n{text}".encode()).digest()


def with_own_ids(
    sources: Sequence[tuple[str, Iterable[CandidateSet]]], renamed_one: Callable[[], None] = lambda: None
) -> list[Iterator[CandidateSet]]:
    """Sources of which no two records share an id: one that is taken gets the name of its file in front.

    Args:
        sources: names of files and their records.
        renamed_one: called for each record that was given another id.
    """
    fresh = FreshIds()

    def renamed(file: str) -> Callable[[CandidateSet], CandidateSet]:
        def rename(record: CandidateSet) -> CandidateSet:
            taken = record.id in fresh.seen
            ident = fresh.take(f"{Path(file).name.split('.')[0]}/{record.id}" if taken else record.id)
            if taken:
                renamed_one()
            return record if ident == record.id else dataclasses.replace(record, id=ident)

        return rename

    return [map(renamed(file), records) for file, records in sources]
