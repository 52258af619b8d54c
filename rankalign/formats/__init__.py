"""Foreign data formats, both ways. One file a family; add one by a file and a line in :data:`FORMATS`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from rankalign.records import CandidateSet, OnError, Row
from rankalign.registry import Entry, Registry


@dataclass
class Losses:
    """What a writer had to leave out, by reason, so that nothing is dropped in silence."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, count: int = 1) -> None:
        """Count ``reason`` once more."""
        self.counts[reason] = self.counts.get(reason, 0) + count


class Format(Protocol):
    """A module-level object of each format file."""

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from foreign rows (line number, object). A bad row goes to ``on_error`` and is left out."""
        ...

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """Foreign rows from records; what the format cannot hold is counted in ``losses``."""
        ...


FORMATS = Registry(
    "format",
    {
        "rankalign": Entry("rankalign.formats.native:FORMAT", "our own record, one prompt with N responses a line"),
        "rrhf": Entry("rankalign.formats.rrhf:FORMAT", "query, responses, scores (RRHF, Wombat)"),
        "trl": Entry("rankalign.formats.trl:FORMAT", "prompt, chosen, rejected and TRL's other shapes"),
        "alpaca": Entry("rankalign.formats.alpaca:FORMAT", "instruction, input, output (Stanford Alpaca)"),
    },
)
