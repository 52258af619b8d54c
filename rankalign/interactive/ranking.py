"""Ranking by hand: what an annotator did, as events in a journal, and the records that come of it.

Beside the output lies the folder ``OUTPUT.labels`` with one journal an annotator. An event is on disk before anybody is
told of it; the state is what the events lead to, so a kill at any moment loses nothing that was acknowledged.
"""

from __future__ import annotations

import fcntl
import hashlib
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rankalign.data.messages import message_text
from rankalign.data.records import CandidateSet, Response, judges, write
from rankalign.errors import InputError
from rankalign.storage.files import read_text, write_text
from rankalign.storage.journal import HEADER, Journal, peek
from rankalign.storage.jsonl import dumps

Levels = list[list[int]]
"""A ranking: groups of tied responses (indices into the record), best group first; who is in none has no rank."""
LONGEST_NAME = 64


class Stale(InputError):
    """The page that asks has not seen the latest event; it must load the state again."""


@dataclass
class Rankings:
    """What the events of one annotator lead to.

    Attributes:
        prints: fingerprint by record id; events about other records, or other texts, are set aside.
        done: the ranking that stands, by record id; an empty one is a skipped set.
        drafts: rankings begun and not committed.
        trail: committed sets in order, each with the ranking that stood before, for undo.
        aside: ids of sets whose events are set aside.
    """

    prints: Mapping[str, str]
    done: dict[str, Levels] = field(default_factory=dict)
    drafts: dict[str, Levels] = field(default_factory=dict)
    trail: list[tuple[str, Levels | None]] = field(default_factory=list)
    aside: set[str] = field(default_factory=set)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event: ``draft`` and ``commit`` carry levels, ``undo`` takes back the last commit."""
        name = event["set"]
        if self.prints.get(name) != event["print"]:
            self.aside.add(name)
        elif event["do"] == "draft":
            self.drafts[name] = event["levels"]
        elif event["do"] == "commit":
            self.trail.append((name, self.done.get(name)))
            self.done[name] = event["levels"]
            self.drafts.pop(name, None)
        else:
            before = self.trail.pop()[1]
            self.drafts[name] = self.done.pop(name)
            if before is not None:
                self.done[name] = before


def fingerprint(record: CandidateSet) -> str:
    """Of what an annotator is shown: the prompt and the texts."""
    shown = dumps([record.prompt, [_shown(response) for response in record.responses]])
    return hashlib.sha256(shown.encode("utf-8")).hexdigest()[:16]


def _shown(response: Response) -> str:
    """An answer as an annotator reads it: its text, or all of its messages; a thought that is part of a text stays."""
    return response.text if response.messages is None else response.shown(thoughts=True)


def level_scores(levels: Levels, count: int) -> list[float | None]:
    """Scores of ``count`` responses: the best of N levels gets N, the next N - 1, ..., the last 1; ties are equal."""
    scores: list[float | None] = [None] * count
    for depth, level in enumerate(levels):
        for index in level:
            scores[index] = float(len(levels) - depth)
    return scores


def shown_order(record: CandidateSet, annotator: str, seed: int) -> list[int]:
    """The order in which an annotator sees the responses; it depends on the seed, the annotator and the record."""
    order = list(range(len(record.responses)))
    random.Random(dumps([seed, annotator, record.id])).shuffle(order)
    return order


# --- the folder of journals --------------------------------------------------------------------------------------


def labels_folder(output: Path) -> Path:
    """Where the journals of an output lie."""
    return output.with_name(output.name + ".labels")


def journal_path(output: Path, annotator: str) -> Path:
    """The journal of one annotator; any name makes a valid file name."""
    return labels_folder(output) / f"{quote(annotator, safe='')}.journal"


def look_path(output: Path, annotator: str) -> Path:
    """Where it is noted how an annotator wants the answers shown."""
    return journal_path(output, annotator).with_suffix(".columns")


def read_rankings(output: Path, prints: Mapping[str, str]) -> dict[str, Rankings]:
    """What every annotator of an output has ranked so far, those at work in other processes included."""
    found = {}
    for path in sorted(labels_folder(output).glob("*.journal")):
        items = peek(path)
        if HEADER in items:  # else its owner has only just made it
            annotator = items.pop(HEADER)["annotator"]
            found[annotator] = replay(items.values(), prints)
    return found


def replay(events: Iterable[Mapping[str, Any]], prints: Mapping[str, str]) -> Rankings:
    """The state after ``events``."""
    rankings = Rankings(prints)
    for event in events:
        rankings.apply(event)
    return rankings


def labelled(sets: Sequence[CandidateSet], found: Mapping[str, Rankings]) -> Iterator[CandidateSet]:
    """The records with the annotators' scores beside those they had."""
    for record in sets:
        given = [(name, own.done[record.id]) for name, own in found.items() if own.done.get(record.id)]
        scores = {name: level_scores(levels, len(record.responses)) for name, levels in given}
        responses = [
            replace(r, scores=r.scores | {name: own[i] for name, own in scores.items() if own[i] is not None})
            for i, r in enumerate(record.responses)
        ]
        yield replace(record, responses=responses)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time puts the output together."""
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- one annotator at work ---------------------------------------------------------------------------------------


class Session:
    """One annotator's work on one file; safe to call from several threads.

    Use as a context manager; it holds the annotator's journal until closed.

    Args:
        sets: the records to rank; those with fewer than two responses are passed over and counted.
        output: where the records with scores go, not the file they come from.
        annotator: who ranks; the scores stand under this name.
        seed: of the orders in which responses are shown.
        overlap: begin with the sets that other annotators have ranked, to measure agreement; else these come last.

    Raises:
        InputError: a name that cannot be used or is taken, nothing to rank, or the journal is in use.
    """

    def __init__(
        self, sets: Sequence[CandidateSet], output: Path, annotator: str, seed: int = 0, overlap: bool = False
    ) -> None:
        self.sets, self.output, self.annotator, self.seed = sets, output, annotator, seed
        _check_name(annotator, sets)
        if output.exists() and not labels_folder(output).exists():
            raise InputError(f"{output}: is there already and no ranking by hand made it; name another output")
        self._prints = {record.id: fingerprint(record) for record in sets if len(record.responses) > 1}
        if not self._prints:
            raise InputError("nothing to rank: no record has two responses or more")
        self._journal = Journal(journal_path(output, annotator), {"annotator": annotator})
        self._lock = threading.RLock()  # taken again by view, which what takes it calls
        self.rankings = replay(self._journal.done.values(), self._prints)  # the journal keeps the order of events
        others = [own.done for name, own in read_rankings(output, self._prints).items() if name != annotator]
        queue = [record for record in sets if record.id in self._prints]
        self.queue = sorted(queue, key=lambda record: any(record.id in done for done in others) != overlap)
        self._written = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()

    # - what is seen -

    def counts(self) -> dict[str, int]:
        """``total``, ``ranked``, ``skipped``, ``left``: sets in the queue by what became of them."""
        done = [self.rankings.done[record.id] for record in self.queue if record.id in self.rankings.done]
        ranked = sum(map(bool, done))
        return {
            "total": len(self.queue),
            "ranked": ranked,
            "skipped": len(done) - ranked,
            "left": len(self.queue) - len(done),
        }

    def view(self, at: int | None = None) -> dict[str, Any]:
        """What the page shows: set ``at`` of the queue, or the first open one, or the end.

        Nothing in it tells who wrote an answer or what others think of it: texts in the annotator's own order, levels
        as places in that order.
        """
        with self._lock:
            at = self._next_open(0) if at is None else at
            turn = len(self._journal.done)
            view = {"annotator": self.annotator, "turn": turn, "can_undo": bool(self.rankings.trail), **self.counts()}
            view["columns"] = self.columns
            return view | (self._end() if at is None else self._set(at))

    def _set(self, at: int) -> dict[str, Any]:
        record = self._record(at)
        order = shown_order(record, self.annotator, self.seed)
        done = self.rankings.done.get(record.id)
        levels = self.rankings.drafts.get(record.id, done or [])
        prompt = [{"role": "", "content": record.prompt}] if isinstance(record.prompt, str) else record.prompt
        return {
            "at": at,
            "status": "open" if done is None else "ranked" if done else "skipped",
            "prompt": [{"role": m["role"], "content": message_text(m, thoughts=True)} for m in prompt],
            "answers": [_shown(record.responses[index]) for index in order],
            "levels": [[order.index(index) for index in level] for level in levels],
        }

    def _end(self) -> dict[str, Any]:
        return {"at": None, "status": "end", "output": str(self.output), "agreement": self.agreement()}

    def _next_open(self, start: int) -> int | None:
        """The first set from ``start`` on, then from the beginning, that is neither ranked nor skipped."""
        places = [*range(start, len(self.queue)), *range(start)]
        return next((at for at in places if self.queue[at].id not in self.rankings.done), None)

    def _record(self, at: int) -> CandidateSet:
        if not 0 <= at < len(self.queue):
            raise InputError(f"there is no set {at + 1}; there are {len(self.queue)}")
        return self.queue[at]

    # - how it is shown -

    @property
    def columns(self) -> int:
        """In how many columns the annotator wants the answers: 1, or 0 for as many as fit."""
        path = look_path(self.output, self.annotator)
        return int(path.is_file() and read_text(path).strip() == "1")

    def choose_columns(self, columns: int) -> dict[str, Any]:
        """Remember the wish from now on, for this annotator and output; returns ``{"columns"}``."""
        if columns not in (0, 1):
            raise InputError(f"columns {columns}: give 1, or 0 for as many as fit")
        write_text(look_path(self.output, self.annotator), f"{columns}\n")
        return {"columns": columns}

    # - what is done -

    def draft(self, turn: int, at: int, levels: Levels) -> dict[str, Any]:
        """Keep a ranking that is not finished; returns ``{"turn"}``."""
        with self._lock:
            self._add(turn, "draft", at, levels)
            return {"turn": len(self._journal.done)}

    def commit(self, turn: int, at: int, levels: Levels) -> dict[str, Any]:
        """Let a ranking stand, or with no level skip the set; returns the view of the next open set.

        Raises:
            InputError: one ranked response alone, which says nothing.
        """
        if sum(map(len, levels)) == 1:
            raise InputError("one answer alone makes no ranking: place another, or skip the set")
        with self._lock:
            self._add(turn, "commit", at, levels)
            self._keep_output()
            return self.view(self._next_open(at))

    def undo(self, turn: int) -> dict[str, Any]:
        """Take back the last commit; returns the view of its set, with the ranking as a draft."""
        with self._lock:
            if not self.rankings.trail:
                raise InputError("there is nothing to undo")
            last = self.rankings.trail[-1][0]
            at = next(place for place, record in enumerate(self.queue) if record.id == last)
            self._add(turn, "undo", at)
            self._keep_output()
            return self.view(at)

    def _add(self, turn: int, what: str, at: int, levels: Levels | None = None) -> None:
        """Put an event on disk, then take it in. Events are never lost to an older page: see :class:`Stale`."""
        record = self._record(at)
        if turn <= len(self._journal.done):  # a page sends the number that its event is to have
            raise Stale("this page is behind: another one has gone on; here is how things stand now")
        event: dict[str, Any] = {"do": what, "set": record.id, "print": self._prints[record.id]}
        if levels is not None:
            order = shown_order(record, self.annotator, self.seed)
            event["levels"] = _translated(levels, order)
        self._journal.append([((f"{len(self._journal.done) + 1:08d}",), event)])
        self.rankings.apply(event)

    def _keep_output(self) -> None:
        """Write the output when the last set is done, and with every change from then on."""
        if self._written or not self.counts()["left"]:
            self.write()

    def write(self) -> dict[str, Any]:
        """Write the records with the scores of all annotators so far; returns what the command reports."""
        with self._lock, _alone(labels_folder(self.output)):
            found = read_rankings(self.output, self._prints)
            write(self.output, labelled(self.sets, found))
            self._written = True
            facts = {"output": str(self.output), "annotator": self.annotator, **self.counts()}
            facts |= {"single": len(self.sets) - len(self.queue), "set_aside": len(self.rankings.aside)}
            return facts | {"annotators": [name for name, own in found.items() if own.done]}

    def agreement(self) -> dict[str, Any] | None:
        """Agreement of all annotators as ``metrics``, ``n`` and ``ci95``; None where no set was ranked by two."""
        from rankalign.evaluation.raters.concordance import evaluate_raters

        found = read_rankings(self.output, self._prints)
        sets = list(labelled(self.queue, found))
        known = judges(sets)
        raters = [name for name in found if name in known]
        try:
            return evaluate_raters(sets, raters, self.seed).as_dict() | {"raters": raters}
        except InputError:
            return None


def _check_name(annotator: str, sets: Sequence[CandidateSet]) -> None:
    if not annotator.isprintable() or annotator != annotator.strip() or not 0 < len(annotator) <= LONGEST_NAME:
        raise InputError(f"--annotator {annotator!r}: 1 to {LONGEST_NAME} printable characters, no blanks at the ends")
    if annotator in judges(sets):
        raise InputError(f"the records have scores by {annotator!r} already; name the annotator otherwise")


def _translated(levels: Levels, order: Sequence[int]) -> Levels:
    """Levels of shown places as levels of indices into the record.

    Raises:
        InputError: an empty level, a place that is none, or one that stands twice.
    """
    places = [place for level in levels for place in level]
    if not all(levels) or len(set(places)) < len(places) or not set(places) <= set(range(len(order))):
        raise InputError("a ranking names each answer at most once, and no empty rank")
    return [[order[place] for place in level] for level in levels]  # tied answers stay as they were put
