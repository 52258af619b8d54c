"""Rules about the whole set (L4xx), which see its records one after the other and hold hashes and counts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from rankalign.data.formats.unread import left_unread
from rankalign.data.messages import message_text
from rankalign.data.overlap import NearDuplicates, SharedRuns
from rankalign.data.records import CandidateSet
from rankalign.data.shares import wilson
from rankalign.storage.places import ABSENT, Names, Places

# The longest-answer rule is a finding when the lower end of its 95 % interval is above this.
LENGTH_ACCURACY = 0.6
Seen = Iterator[tuple[str, str]]


class Watch:
    """Looks at all records of a set: both methods yield a record's id (or nothing) and what was seen.

    Args:
        held_out: prompts of a test split.
    """

    def __init__(self, held_out: Places) -> None:
        self.held_out = held_out

    def see(self, record: CandidateSet) -> Seen:
        """What one more record shows."""
        return iter(())

    def end(self) -> Seen:
        """What all of them show together."""
        return iter(())


def prompt_key(record: CandidateSet) -> str:
    """A prompt without the differences that do not make it another prompt: white space and capitals."""
    parts = (
        [record.prompt] if isinstance(record.prompt, str) else [message_text(m, thoughts=True) for m in record.prompt]
    )
    return " ".join("\n".join(parts).split()).casefold()


def prompt_keys(sets: Iterable[CandidateSet]) -> Places:
    """The prompts of a set, to be found in it."""
    found = Places()
    for record in sets:
        found.add(prompt_key(record))
    return found


class SamePrompt(Watch):
    """Prompts that stand in the set twice."""

    def __init__(self, held_out: Places) -> None:
        super().__init__(held_out)
        self._first, self._names = Places(), Names()

    def see(self, record: CandidateSet) -> Seen:
        """See :meth:`Watch.see`."""
        key = prompt_key(record)
        if (earlier := self._first.find(key)) == ABSENT:
            self._first.put(key, self._names.add(record.id))
        else:
            yield record.id, f"asks the same as {self._names[earlier]!r}"


class HeldOut(Watch):
    """Prompts that stand in the held-out set as well."""

    def see(self, record: CandidateSet) -> Seen:
        """See :meth:`Watch.see`."""
        if self.held_out and prompt_key(record) in self.held_out:
            yield record.id, "its prompt stands in the held-out set"


class Unread(Watch):
    """Columns that nothing reads."""

    def __init__(self, held_out: Places) -> None:
        super().__init__(held_out)
        self._counts = Counter[str]()

    def see(self, record: CandidateSet) -> Seen:
        """See :meth:`Watch.see`."""
        self._counts.update(left_unread(record))
        return iter(())

    def end(self) -> Seen:
        """See :meth:`Watch.end`."""
        for column, count in self._counts.items():
            yield "", f"{column!r} of {count} records is read by nothing: does it hold an answer, a score or a verdict?"


@dataclass(frozen=True)
class Baseline:
    """How often the longer answer is the better one.

    Attributes:
        pairs: strict pairs of this judge.
        accuracy: share in which the longer text (characters) has the higher score; equal lengths count half. None
            without a pair.
        low: lower end of the 95 % Wilson interval of ``accuracy``, None without a pair.
    """

    pairs: int
    accuracy: float | None
    low: float | None


class Longest:
    """The baseline that calls the longer answer the better one, by judge, over all strict pairs."""

    def __init__(self) -> None:
        self._pairs, self._right = Counter[str](), Counter[str]()

    def see(self, record: CandidateSet) -> None:
        """Count one record's pairs."""
        known: dict[str, list[tuple[int, float]]] = {}
        for response in record.responses:
            for judge, score in response.scores.items():
                if score is not None:
                    known.setdefault(judge, []).append((len(response.shown()), score))
        for judge, scored in known.items():
            self._pairs[judge] += 0  # a judge without a strict pair has a baseline without a value
            for (length, score), (other_length, other) in combinations(scored, 2):
                if score != other:
                    self._pairs[judge] += 1
                    # Twice the half that an equal length counts, so that it stays a whole number.
                    self._right[judge] += 1 + _sign(length - other_length) * _sign(score - other)

    def baselines(self) -> dict[str, Baseline]:
        """By judge, in order of first sight."""
        return {judge: _baseline(pairs, self._right[judge] / 2) for judge, pairs in self._pairs.items()}


def longest_answer(records: Iterable[CandidateSet], judge: str) -> Baseline:
    """The baseline of one judge; see :class:`Longest`."""
    found = Longest()
    for record in records:
        found.see(record)
    return found.baselines().get(judge, Baseline(0, None, None))


def _baseline(pairs: int, right: float) -> Baseline:
    return Baseline(pairs, right / pairs, wilson(right / pairs, pairs)[0]) if pairs else Baseline(0, None, None)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


class LengthDecides(Watch):
    """Whether the longer answer is mostly the better one."""

    def __init__(self, held_out: Places) -> None:
        super().__init__(held_out)
        self.longest = Longest()

    def see(self, record: CandidateSet) -> Seen:
        """See :meth:`Watch.see`."""
        self.longest.see(record)
        return iter(())

    def end(self) -> Seen:
        """See :meth:`Watch.end`."""
        for judge, found in self.longest.baselines().items():
            if found.low is not None and found.low > LENGTH_ACCURACY:
                seen = f"{found.accuracy:.1%} of {found.pairs} pairs"
                yield "", f"calling the longer answer the better one agrees with judge {judge!r} on {seen}"


class NearlySame(Watch):
    """Prompts that nearly repeat an earlier one.

    Args:
        least: Jaccard index of their runs of three words.
    """

    def __init__(self, least: float) -> None:
        super().__init__(Places())
        self._near = NearDuplicates(least)

    def see(self, record: CandidateSet) -> Seen:
        """See :meth:`Watch.see`."""
        if found := self._near.earlier(record):
            yield record.id, f"asks nearly the same as {found[0]!r}: {found[1]:.0%} of their runs of words are shared"


class Leaked(Watch):
    """Prompts that share a long run of words with an evaluation set.

    Args:
        sets: the evaluation sets.
    """

    def __init__(self, sets: Iterable[CandidateSet]) -> None:
        super().__init__(Places())
        self._shared = SharedRuns(sets)

    def see(self, record: CandidateSet) -> Seen:
        """See :meth:`Watch.see`."""
        if found := self._shared.shared(record):
            yield record.id, f"shares {len(found[1])} words in a row with {found[0]!r}: {' '.join(found[1])!r}"
