"""Prompts that are nearly the same as others: near-duplicates in one set, and runs of words shared with another set.

Both look at words as :func:`rankalign.data.words.words` has them, so capitals and punctuation do not count, and scripts
without blanks are cut at each sign.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rankalign.data.messages import message_text
from rankalign.data.records import CandidateSet
from rankalign.data.words import words
from rankalign.errors import InputError, missing_extra
from rankalign.storage.places import ABSENT, Names, Places

SHINGLE = 3  # words; runs of more would call short prompts different for a single changed word
PERMUTATIONS = 100
RECALL = 0.99  # of pairs just as alike as is asked for; of more alike ones it is higher
_MOST_MATES = 100  # earlier prompts of one band that are looked at: those of one template share bands by the thousand

GRAM = 13
"""Words in a row that no two texts share by chance (Brown et al. 2020, "Language Models are Few-Shot Learners",
appendix C; the same in lm-evaluation-harness)."""
SHORTEST = 8  # a prompt of fewer words is only compared as a whole, as GPT-3's authors did
_SIGNS_A_WORD = 2  # of Chinese and Japanese, on average


def prompt_words(record: CandidateSet) -> list[str]:
    """The words of a prompt, roles left aside."""
    parts = [record.prompt] if isinstance(record.prompt, str) else [message_text(m) for m in record.prompt]
    return words("\n".join(parts))


def shingles(record: CandidateSet) -> set[tuple[str, ...]]:
    """The runs of :data:`SHINGLE` words of a prompt; of a shorter one all its words."""
    return set(_runs(prompt_words(record), SHINGLE))


def _runs(text: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(text[start : start + n]) for start in range(max(1, len(text) - n + 1)))


class NearDuplicates:
    """Tells of one prompt after the other which earlier one it nearly repeats.

    Candidates share a band of their MinHash signatures (Broder 1997; Leskovec et al., "Mining of Massive Datasets", ch.
    3), and each is held against the prompt by the Jaccard index of their runs of three words, so none is named that is
    less alike. Of those that are just as alike as is asked for, 1 % may be missed. A prompt takes about 1 KB of memory,
    and its runs wait in a temporary file.

    Args:
        least: Jaccard index from which on two prompts are near-duplicates, above 0 and up to 1.

    Raises:
        InputError: it is no such share, or ``datasketch`` is missing.
    """

    def __init__(self, least: float) -> None:
        if not 0 < least <= 1:
            raise InputError(f"near-duplicates: the share is a number above 0 and up to 1, got {least:g}")
        try:
            from datasketch import MinHash
        except ImportError:
            raise missing_extra("finding near-duplicates", "dedup") from None
        import numpy  # not at the top: `--help` of the commands imports this file

        self._np = numpy
        self.least, self._rows = least, band_rows(least)
        self._sign: Any = MinHash(PERMUTATIONS, seed=1)
        self._bands, self._ids = Places(), Names()
        self._mates = array("q")  # of each prompt and band, the prompt before it in that band
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as this object)
        self._ends = array("Q", [0])

    def earlier(self, record: CandidateSet) -> tuple[str, float] | None:
        """The id of an earlier prompt that this one nearly repeats, and how alike they are; else it is remembered."""
        runs = self._np.unique(self._np.fromiter(map(hash, shingles(record)), dtype=self._np.int64))
        bands = self._bands_of(record)
        heads = [self._bands.find(band) for band in bands]
        seen = set[int]()
        for number, head in enumerate(heads):
            at, looked = head, 0
            while at != ABSENT and looked < _MOST_MATES:
                if at not in seen:
                    seen.add(at)
                    other = self._runs_at(at)
                    common = len(self._np.intersect1d(runs, other, assume_unique=True))
                    alike = common / (len(runs) + len(other) - common)
                    if alike >= self.least:
                        return self._ids[at], alike
                at, looked = self._mates[at * len(bands) + number], looked + 1
        place = self._ids.add(record.id)
        self._mates.extend(heads)
        for band in bands:
            self._bands.put(band, place)
        self._file.seek(0, 2)
        self._ends.append(self._ends[-1] + self._file.write(runs.tobytes()))
        return None

    def _bands_of(self, record: CandidateSet) -> list[tuple[int, bytes]]:
        sign = self._sign.copy()
        sign.clear()
        sign.update_batch([" ".join(run).encode("utf-8") for run in shingles(record)])
        values, rows = self._np.asarray(sign.hashvalues), self._rows
        return [
            (number, values[number * rows : (number + 1) * rows].tobytes()) for number in range(len(values) // rows)
        ]

    def _runs_at(self, place: int) -> Any:
        self._file.seek(self._ends[place])
        block = self._file.read(self._ends[place + 1] - self._ends[place])
        return self._np.frombuffer(block, dtype=self._np.int64)

    def without(self, records: Iterable[CandidateSet]) -> Iterator[CandidateSet | None]:
        """The records whose prompt repeats no earlier one; None in the place of each of the others."""
        for record in records:
            yield None if self.earlier(record) else record


def band_rows(least: float) -> int:
    """Numbers of a signature in a band: as many as find :data:`RECALL` of the pairs that are just so much alike.

    A band of r numbers is shared with a chance of s^r, one of b bands with 1 - (1 - s^r)^b.
    """
    found = [r for r in range(1, 21) if 1 - (1 - least**r) ** (PERMUTATIONS // r) >= RECALL]
    return max(found, default=1)


class SharedRuns:
    """Tells which prompts share a long run of words with a prompt of evaluation sets.

    The run is :data:`GRAM` words, twice as many signs in scripts without blanks, and all words of a shorter evaluation
    prompt if it has :data:`SHORTEST`.

    Args:
        sets: the evaluation sets' records.
    """

    def __init__(self, sets: Iterable[CandidateSet]) -> None:
        self._runs, self._names, self.sizes = Places(), Names(), set[int]()
        for record in sets:
            text = prompt_words(record)
            scale = _SIGNS_A_WORD if sum(map(len, text)) < 2 * len(text) else 1
            if len(text) < SHORTEST * scale:
                continue
            name, size = self._names.add(record.id), min(GRAM * scale, len(text))
            self.sizes.add(size)
            for run in _runs(text, size):
                self._runs.put(run, name)

    def shared(self, record: CandidateSet) -> tuple[str, tuple[str, ...]] | None:
        """The id of an evaluation prompt that shares a run with the record's, and that run."""
        text = prompt_words(record)
        for size in sorted(self.sizes, reverse=True):
            for run in _runs(text, size) if len(text) >= size else ():
                if (name := self._runs.find(run)) != ABSENT:
                    return self._names[name], run
        return None
