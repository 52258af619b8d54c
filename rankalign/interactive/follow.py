"""A run while it trains: what its folder holds by now, read bit by bit from files that grow, start late or anew."""

from __future__ import annotations

import os
import re
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankalign.data.records import CandidateSet, parse
from rankalign.errors import RecordError
from rankalign.evaluation.report.checks import training_warnings
from rankalign.evaluation.report.curves import CURVES, number, panels
from rankalign.evaluation.report.plots import binned
from rankalign.evaluation.report.summary import best_checkpoint
from rankalign.evaluation.texts.lexical import prompt_text
from rankalign.storage.jsonl import loads

LOG = "log.jsonl"
CHECKED = 4096
"""Bytes before the place where reading goes on that must be as they were; else the file was begun anew."""
CHUNK = 1 << 22
"""Bytes read at once."""
TAIL = 1 << 18
"""Bytes of a file of records, from its end, in which samples are looked for."""
SAMPLES = 5
MOST_WARNINGS = 200
_DRAWN = {name for names in CURVES.values() for name in names}
_ROUND = re.compile(r"round-\d+")


@dataclass
class Tail:
    """The numbers of one growing log; every line is read once.

    A line counts when its line feed is there. A file that is shorter than it was, or holds something else before the
    place that was reached, was begun anew and is read from its beginning; a run that goes on from a checkpoint writes
    such a file. One that is rewritten with the same beginning goes on where it was.

    Attributes:
        path: of the file.
        series: steps and values by column.
        evals: lines with held-out measurements, for the best checkpoint.
        warnings: (step, name, words) as training gave them.
        last: the last line.
        lines: how many lines were read since the beginning.
        broken: how many of them were no JSON objects.
        lives: how often the file was begun.
    """

    path: Path
    series: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    evals: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[tuple[int, str, str]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    lines: int = 0
    broken: int = 0
    lives: int = 0
    _at: int = 0
    _before: bytes = b""

    def poll(self) -> bool:
        """Read what is new; whether anything was."""
        try:
            with open(self.path, "rb") as source:
                return self._read(source)
        except OSError:  # not there yet, or between two lives
            if not self._at:
                return False
            self._begin()
            return True

    def _read(self, source: Any) -> bool:
        again = os.fstat(source.fileno()).st_size < self._at
        if not again and self._before:
            source.seek(self._at - len(self._before))
            again = source.read(len(self._before)) != self._before
        if again:
            self._begin()
        if not self.lives:
            self.lives = 1
        source.seek(self._at)
        before = self.lines
        rest = b""
        while chunk := source.read(CHUNK):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                self._take(line)
                self._at += len(line) + 1
        start = max(self._at - CHECKED, 0)
        source.seek(start)
        self._before = source.read(self._at - start)
        return again or self.lines != before

    def _begin(self) -> None:
        """Forget what the former life of the file said."""
        self.series, self.evals, self.warnings, self.last = {}, [], [], {}
        self.lines = self.broken = self._at = 0
        self.lives, self._before = self.lives + 1, b""

    def _take(self, raw: bytes) -> None:
        if not raw.strip():
            return
        self.lines += 1
        try:
            row = loads(raw.decode("utf-8"))
        except ValueError:
            row = None
        if not isinstance(row, dict):
            self.broken += 1
            return
        self.last = row
        self.warnings = (self.warnings + training_warnings([row]))[-MOST_WARNINGS:]
        if any(name.startswith("eval_") for name in row):
            self.evals.append(row)
        step = number(row, "step")
        for name in _DRAWN & row.keys() if step is not None else ():
            if (value := number(row, name)) is not None:
                steps, values = self.series.setdefault(name, (array("d"), array("d")))
                steps.append(step or 0.0)
                values.append(value)

    @property
    def step(self) -> int:
        """The highest step so far."""
        return int(max((steps[-1] for steps, _ in self.series.values()), default=number(self.last, "step") or 0))


# --- a run's folder ----------------------------------------------------------------------------------------------


class Follower:
    """What a run's folder holds by now.

    Args:
        folder: of ``rankalign train`` (any method), ``run``, or ``iterate``; it need not be there yet.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.version = 0
        self._tails: dict[Path, Tail] = {}
        self._logs: list[Path] = []
        self._samples: tuple[Path, float, int] | None = None
        self._changed = time.time()

    def poll(self) -> int:
        """Read what is new; a number that grows with every change."""
        logs = logs_of(self.folder)
        changed = [self._tails.setdefault(path, Tail(path)).poll() for path in logs]
        gone = [path for path in self._tails if path not in logs]
        for path in gone:
            del self._tails[path]
        newest = newest_records(self.folder)
        if any(changed) or gone or logs != self._logs or newest != self._samples:
            self.version += 1
            self._changed = max((path.stat().st_mtime for path in logs if path.exists()), default=time.time())
        self._logs, self._samples = logs, newest
        return self.version

    def state(self) -> dict[str, Any]:
        """What a page or a terminal shows: see the keys."""
        tails = [self._tails[path] for path in self._logs]
        finished = (self.folder / "manifest.json").is_file()
        started = any(tail.lines for tail in tails)
        notes = [f"{t.broken} lines of {t.path.name} could not be read." for t in tails if t.broken]
        evals = [row for tail, first in _offsets(tails) for row in _moved(tail.evals, first)]
        best = best_checkpoint(evals, {}, {})
        last = tails[-1].last if tails else {}
        return {
            "name": self.folder.resolve().name,
            "version": self.version,
            "status": "finished" if finished else "running" if started else "waiting",
            "step": max((first + tail.step for tail, first in _offsets(tails)), default=0),
            "epoch": number(last, "epoch"),
            "round": len(tails) if len(tails) > 1 else None,
            "changed": self._changed if started else None,
            "restarts": sum(max(tail.lives - 1, 0) for tail in tails),
            "best": best.sentence() if best and not finished else "",
            "warnings": [[s + f, n, w] for tail, f in _offsets(tails) for s, n, w in tail.warnings],
            "notes": notes,
            "panels": self._panels(tails),
            "samples": read_samples(self._samples[0]) if self._samples else [],
            "samples_of": str(self._samples[0].relative_to(self.folder)) if self._samples else "",
        }

    def _panels(self, tails: Sequence[Tail]) -> list[dict[str, Any]]:
        names = {name for tail in tails for name in tail.series}
        drawn, found = [], []
        for title, columns in panels(names).items():
            series: list[dict[str, Any]] = []
            for column in columns:
                points = _thinned(column, tails)
                if points not in drawn:  # a loss with one part is shown once
                    drawn.append(points)
                    series.append({"name": column, "points": points})
            if series:
                found.append({"title": title, "series": series})
        return found


def _offsets(tails: Sequence[Tail]) -> Iterator[tuple[Tail, int]]:
    """Each log with what its steps lack to be those of the whole run; logs of finished rounds count so already."""
    done = 0
    for tail in tails:
        first = 0 if "round" in tail.last else done
        yield tail, first
        done = max(done, first + tail.step)


def _moved(rows: Sequence[Mapping[str, Any]], first: int) -> list[dict[str, Any]]:
    return [{**row, "step": step + first} for row in rows if (step := number(row, "step")) is not None]


def _thinned(column: str, tails: Sequence[Tail]) -> list[list[float]]:
    parts = [(t.series[column], first) for t, first in _offsets(tails) if column in t.series]
    steps = np.concatenate([np.array(steps) + first for (steps, _), first in parts])
    values = np.concatenate([np.array(values) for (_, values), _ in parts])
    steps, values = binned(steps, values)
    return [[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in zip(steps, values, strict=True)]


def logs_of(folder: Path) -> list[Path]:
    """The logs of a run in the order in which they were begun.

    Its own one, where there is one; else that of its training; of rounds that of each, and of the round under way what
    its training writes, which for the last one is the run's model.
    """
    if (folder / LOG).is_file():
        return [folder / LOG]
    rounds = [path for path in folder.glob("round-*") if _ROUND.fullmatch(path.name)]
    rounds.sort(key=lambda path: int(path.name.partition("-")[2]))
    found = [_first(place / LOG, place / "model" / LOG, place / "adapter" / LOG) for place in rounds]
    if not found or not found[-1]:
        found.append(_first(folder / "model" / LOG, folder / "train" / LOG))
    return [path for own in found for path in own]


def _first(*paths: Path) -> list[Path]:
    return [path for path in paths if path.is_file()][:1]


# --- samples -----------------------------------------------------------------------------------------------------


def newest_records(folder: Path) -> tuple[Path, float, int] | None:
    """The file of answers that was written to last, its time and size; None where there is none."""
    names = (
        "watched.jsonl",
        "*/watched.jsonl",
        "after*.jsonl",
        "candidates*.jsonl",
        "before*.jsonl",
        "round-*/candidates*.jsonl",
    )
    found = []
    for path in (path for name in names for path in folder.glob(name)):
        try:
            about = path.stat()
        except OSError:
            continue
        if about.st_size and not path.name.endswith(".manifest.json"):
            found.append((about.st_mtime, path, about.st_size))
    if not found:
        return None
    when, path, size = max(found)
    return path, when, size


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The last few records, as ``{"id", "prompt", "answers": [{"policy", "scores", "finished", "text"}]}``."""
    try:
        with open(path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            source.seek(max(size - TAIL, 0))
            lines = source.read(TAIL).split(b"\n")[1 if size > TAIL else 0 : -1]  # the last may be half written
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in reversed(lines):
        try:
            record = parse(loads(line.decode("utf-8")), path)
        except (ValueError, RecordError, TypeError, AttributeError):
            continue
        if record.responses:
            found.append(_shown(record))
        if len(found) == SAMPLES:
            break
    return found


def _shown(record: CandidateSet) -> dict[str, Any]:
    answers = []
    for response in record.responses:
        scores = {judge: score for judge, score in response.scores.items() if score is not None}
        about = {"policy": response.policy, "scores": scores, "finished": response.finished}
        answers.append({**about, "text": response.shown(thoughts=True)})
    return {"id": record.id, "prompt": prompt_text(record.prompt), "answers": answers}
