"""Held-out prompts with the answers before and after: the ones that the page shows, and all for the file beside it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rankalign.data.records import CandidateSet, score_of
from rankalign.evaluation.report.marks import Parts, marked
from rankalign.evaluation.report.runs import Run
from rankalign.evaluation.tables import printable
from rankalign.evaluation.texts.lexical import prompt_text
from rankalign.storage.places import ABSENT, Places

MOST_SAMPLES = 400
MOST_TEXT = 1 << 21  # characters of samples on a page, which long answers reach before their number does


@dataclass
class Sample:
    """One held-out prompt with the first answer of either side."""

    id: str
    prompt: str
    before: str | None
    after: str | None
    score_before: float | None
    score_after: float | None

    @property
    def size(self) -> int:
        """Characters of its texts."""
        return len(self.prompt) + len(self.before or "") + len(self.after or "")

    @property
    def gain(self) -> float | None:
        """Score after minus before."""
        if self.score_before is None or self.score_after is None:
            return None
        return self.score_after - self.score_before

    @property
    def parts(self) -> tuple[Parts, Parts] | None:
        """Both answers in pieces with what differs marked; None where there are not two, or nothing in common."""
        if self.before is None or self.after is None or self.before == self.after:
            return None
        return marked(self.before, self.after)


Pair = tuple[CandidateSet | None, CandidateSet | None]


def samples(run: Run) -> tuple[list[Sample], int]:
    """Held-out samples in file order, those whose score moved most, and how many there are.

    :data:`MOST_SAMPLES` at most, and fewer where their texts come to :data:`MOST_TEXT`.
    """
    gains = array("d", (abs(sample_of(*pair, run.judge).gain or 0.0) for pair in sides(run)))
    order = list(map(int, np.argsort(-np.frombuffer(gains), kind="stable")[:MOST_SAMPLES])) if gains else []
    wanted = set(order)
    found = {n: sample_of(*pair, run.judge) for n, pair in enumerate(sides(run)) if n in wanted}
    size, kept = 0, list[int]()
    for place in order:
        size += found[place].size
        if kept and size > MOST_TEXT:
            break
        kept.append(place)
    return [found[place] for place in sorted(kept)], len(gains)


def sides(run: Run) -> Iterator[Pair]:
    """Each prompt's record before and after: those of the trained model's file, then what only the other one has."""
    places = [Places(), Places()]
    for own, sets in zip(places, (run.before, run.after), strict=True):
        for number, record in enumerate(sets):
            own.put(record.id, number)
    for new in run.after:
        at = places[0].find(new.id)
        yield None if at == ABSENT else run.before[at], new
    for old in run.before:
        if old.id not in places[1]:
            yield old, None


def sample_of(old: CandidateSet | None, new: CandidateSet | None, judge: str) -> Sample:
    """The sample of one prompt, from its records before and after."""
    known = new or old
    ident, prompt = (known.id, printable(prompt_text(known.prompt))) if known else ("", "")
    texts = [
        printable(record.responses[0].shown(thoughts=True)) if record and record.responses else None
        for record in (old, new)
    ]
    firsts = [(record, record.responses[0]) if record and record.responses else None for record in (old, new)]
    scores = [score_of(*first, judge) if first else None for first in firsts]
    return Sample(printable(ident), prompt, texts[0], texts[1], scores[0], scores[1])
