"""Which examples are hard, and which are probably labelled wrongly, from the ledger of a training run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError
from rankalign.evaluation.tables import Table
from rankalign.storage.jsonl import read_rows

PLACES = ("ledger.jsonl", "train/ledger.jsonl", "model/ledger.jsonl")
SHOWN = 20
_NUMBERS = ("loss", "margin", "tau")


@dataclass(frozen=True)
class Entry:
    """One example in one epoch; what was not defined is None.

    Attributes:
        id: of the prompt.
        epoch: from 1.
        loss: its loss.
        margin: value of its best candidate less that of its worst, by the judge's scores; mean log-probabilities a
            token, or rewards.
        tau: Kendall's tau-b of the model's values against the judge's scores.
    """

    id: str
    epoch: int
    loss: float | None
    margin: float | None
    tau: float | None


@dataclass(frozen=True)
class Example:
    """One example over all its epochs.

    Attributes:
        id: of the prompt.
        epochs: how many have an entry.
        first_loss: in the first of them.
        last_loss: in the last.
        margin: mean margin over epochs (the area under the margin of Pleiss et al. 2020); None without candidates.
        tau: mean rank correlation over epochs; None where it never was defined.
    """

    id: str
    epochs: int
    first_loss: float | None
    last_loss: float | None
    margin: float | None
    tau: float | None

    @property
    def suspect(self) -> bool:
        """Whether the model, by what it learned from all the others, ranks it the other way round."""
        return self.margin is not None and self.margin < 0 and self.tau is not None and self.tau < 0


@dataclass
class Findings:
    """What a ledger shows.

    Attributes:
        entries: all entries.
        examples: by id, in order of first sight.
        losses: mean loss by epoch.
        taus: mean rank correlation by epoch, over the examples that have one.
    """

    entries: list[Entry]
    examples: list[Example]
    losses: dict[int, float]
    taus: dict[int, float]

    @property
    def hardest(self) -> list[Example]:
        """Examples by falling loss in their last epoch."""
        known = [(example.last_loss, example) for example in self.examples if example.last_loss is not None]
        return [example for _, example in sorted(known, key=lambda item: -item[0])]

    @property
    def mislabelled(self) -> list[Example]:
        """Suspects, the most negative mean margin first. A hard example may be among them: read before deleting."""
        known = [(example.margin or 0.0, example) for example in self.examples if example.suspect]
        return [example for _, example in sorted(known, key=lambda item: item[0])]

    def as_dict(self, most: int = SHOWN) -> dict[str, Any]:
        """What ``--json`` prints; lists hold ``most`` examples at most."""
        epochs = [{"epoch": e, "loss": self.losses[e], "tau": self.taus.get(e)} for e in self.losses]
        counts = {"examples": len(self.examples), "entries": len(self.entries), "suspects": len(self.mislabelled)}
        lists = {"hardest": self.hardest[:most], "mislabelled": self.mislabelled[:most]}
        return counts | {"epochs": epochs} | {name: [vars(e) for e in own] for name, own in lists.items()}

    def tables(self, most: int = SHOWN) -> list[Table]:
        """Both lists for people."""
        suspects = (
            f"{len(self.mislabelled)} of {len(self.examples)} examples are ranked against their scores over the epochs"
        )
        return [
            _table("Probably mislabelled", self.mislabelled[:most], suspects + "; read them before you delete any"),
            _table("Hardest examples", self.hardest[:most], "by loss in the last epoch"),
        ]


def _table(title: str, examples: Sequence[Example], note: str) -> Table:
    columns = ["example", "first loss", "last loss", "mean margin", "rank correlation", "epochs"]
    return Table(title, columns, [[e.id, e.first_loss, e.last_loss, e.margin, e.tau, e.epochs] for e in examples], note)


def find_ledger(folder: str | os.PathLike[str]) -> Path | None:
    """The ledger of a run folder, or a ledger itself; None where there is none."""
    root = Path(folder)
    return root if root.is_file() else next((path for name in PLACES if (path := root / name).is_file()), None)


def read_ledger(folder: str | os.PathLike[str]) -> Findings:
    """What the ledger of a run shows.

    Args:
        folder: a run folder, a folder of ``rankalign train``, or the file.

    Raises:
        InputError: there is no ledger, or it is empty.
        RecordError: an entry is broken.
    """
    path = find_ledger(folder)
    if path is None:
        raise InputError(f"{folder}: no ledger.jsonl; `rankalign train` writes one (PPO has no ranked examples)")
    return analyse([_entry(Checker(path, line), row) for line, row in read_rows(path)])


def _entry(check: Checker, row: dict[str, Any]) -> Entry:
    ident = check.text(check.need(row, "id"), "id", empty=False)
    numbers = [None if row.get(name) is None else float(check.number(row[name], name)) for name in _NUMBERS]
    return Entry(ident, int(check.number(check.need(row, "epoch"), "epoch")), *numbers)


def analyse(entries: Sequence[Entry]) -> Findings:
    """Findings from entries in any order."""
    by_id: dict[str, list[Entry]] = {}
    for entry in entries:
        by_id.setdefault(entry.id, []).append(entry)
    losses, taus = _by_epoch(entries, "loss"), _by_epoch(entries, "tau")
    return Findings(list(entries), [_example(own) for own in by_id.values()], losses, taus)


def _by_epoch(entries: Sequence[Entry], name: str) -> dict[int, float]:
    values: dict[int, list[float | None]] = {}
    for entry in sorted(entries, key=lambda e: e.epoch):
        values.setdefault(entry.epoch, []).append(getattr(entry, name))
    return {epoch: mean for epoch, own in values.items() if (mean := _mean(own)) is not None}


def _example(entries: list[Entry]) -> Example:
    own = sorted(entries, key=lambda entry: entry.epoch)
    margin, tau = _mean([e.margin for e in own]), _mean([e.tau for e in own])
    return Example(own[0].id, len(own), own[0].loss, own[-1].loss, margin, tau)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
