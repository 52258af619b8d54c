"""What a run folder holds, read for its report and for one of several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rankalign.data import records
from rankalign.data.records import CandidateSet
from rankalign.data.spool import Spool
from rankalign.errors import InputError, RecordError
from rankalign.evaluation import cut_warning
from rankalign.evaluation.report.checks import CHECKS
from rankalign.evaluation.report.hard_examples import Findings, find_ledger, read_ledger
from rankalign.storage import jsonl
from rankalign.storage.files import read_text

LOGS = (".", "train", "model")
"""Where in a run's folder its training may lie, and so its ``log.jsonl``."""


@dataclass
class Run:
    """What a run folder holds; whatever is absent is empty.

    Attributes:
        name: the folder's.
        result: ``result.json``.
        log: lines of ``log.jsonl`` (or of that in ``train/`` or ``model/``).
        candidates: scored training candidates.
        before: held-out records answered by the start model.
        after: the same prompts answered by the trained model.
        manifests: every manifest by its path in the folder.
        ledger: what the training ledger shows; None without one.
        kl: nats an answer from the start model, of ``kl.json``; None where it was not measured.
        checks: contents of the files of :data:`rankalign.evaluation.report.checks.CHECKS`, by name.
        judge: whose scores are shown.
        notes: what had to be left out, in words.
        folder: where it lies.
        checkpoints: path in the folder of each checkpoint that is kept, by its step.
    """

    name: str
    result: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    candidates: Sequence[CandidateSet] = ()
    before: Sequence[CandidateSet] = ()
    after: Sequence[CandidateSet] = ()
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    ledger: Findings | None = None
    kl: float | None = None
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    judge: str = ""
    notes: list[str] = field(default_factory=list)
    folder: Path = Path()
    checkpoints: dict[int, str] = field(default_factory=dict)

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the training, from its manifest; empty before that is written."""
        found = (content["settings"] for content in self.manifests.values() if content.get("stage") == "train")
        return next((dict(settings) for settings in found if isinstance(settings, dict)), {})


def read_run(folder: str | os.PathLike[str]) -> Run:
    """All that a run folder holds.

    Raises:
        InputError: nothing that a report could show.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder")
    run = Run(root.resolve().name, folder=root)
    run.result = _json(root / "result.json")
    run.log = _log(root, run)
    for name in ("candidates", "before", "after"):
        setattr(run, name, _records(root / f"{name}.jsonl", run))
    paths = sorted([*root.rglob("manifest.json"), *root.rglob("*.manifest.json")])
    run.manifests = {str(path.relative_to(root)): _json(path) for path in paths}
    run.checkpoints = _checkpoints(root)
    run.ledger = read_ledger(root) if find_ledger(root) else None
    run.kl = _kl(root / "kl.json")
    run.checks = {name: content for name in CHECKS if (content := _json(root / name))}
    if not any((run.result, run.log, run.candidates, run.before, run.after, run.manifests, run.ledger, run.checks)):
        raise InputError(f"{folder}: holds no result.json, log.jsonl, records or manifest to report on")
    sides = {"the start model's": run.before, "the trained model's": run.after, "the candidate": run.candidates}
    run.notes += [said for whose, sets in sides.items() if (said := cut_warning(sets, whose))]
    names = records.judges(chain(run.after, run.before, run.candidates))
    run.judge = str(run.result.get("judge") or (names[0] if names else ""))
    return run


def _checkpoints(root: Path) -> dict[int, str]:
    """Kept checkpoints, of the run itself before those of stages beneath it."""
    paths = [p for where in LOGS for p in sorted((root / where).glob("checkpoint-*")) if p.is_dir()]
    found = [(int(n), str(p.relative_to(root))) for p in paths if (n := p.name.partition("-")[2]).isdecimal()]
    return dict(reversed(found))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = jsonl.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object")
    return found


def _kl(path: Path) -> float | None:
    content = _json(path)
    if not content:
        return None
    value = metrics.get("kl") if isinstance(metrics := content.get("metrics"), dict) else None
    if not isinstance(value, int | float):
        raise InputError(f"{path}: not what `rankalign eval kl --json` prints; write it again or remove it")
    return float(value)


def _log(root: Path, run: Run) -> list[dict[str, Any]]:
    path = next((p for place in LOGS if (p := root / place / "log.jsonl").exists()), None)
    if path is None or not path.stat().st_size:
        return []
    wrong: list[RecordError] = []
    rows = [row for _, row in jsonl.read_rows(path, wrong.append)]
    _note(run, wrong, path)
    return rows


def _records(path: Path, run: Run) -> Sequence[CandidateSet]:
    if not path.exists():
        return ()
    wrong: list[RecordError] = []
    found = Spool(records.read(path, wrong.append))
    _note(run, wrong, path)
    return found


def _note(run: Run, wrong: list[RecordError], path: Path) -> None:
    if wrong:
        run.notes.append(f"{len(wrong)} unreadable lines of {path.name} are left out (first: line {wrong[0].line}).")
