"""Texts as numbers of their words, and their runs of words as 64 bits each: what millions of words fit into."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Keys = NDArray[np.uint64]
# Odd numbers of 64 bits by which the words of a run are told apart by their places. Two of n different runs share a
# sum of products with a chance of about n^2 / 2^65: 10^-5 for 10^7 runs.
_FACTORS = np.random.default_rng(20_26).integers(1 << 62, 1 << 63, size=16, dtype=np.uint64) * 2 + 1


def hashed(text: Sequence[str]) -> Keys:
    """(W,) 64 bits of each word, which this process alone gives it."""
    return np.fromiter(map(hash, text), dtype=np.int64, count=len(text)).view(np.uint64)


def runs(numbers: Keys, size: int) -> Keys:
    """Keys of all runs of ``size`` neighbours among (W,) numbers of words, in order; equal runs have equal ones."""
    count = max(len(numbers) - size + 1, 0)
    if size == 1:
        return numbers
    keys = numbers[:count] * _FACTORS[0]
    for at in range(1, size):
        keys += numbers[at : at + count] * _FACTORS[at]
    return keys


def different(keys: Keys) -> int:
    """How many different ones there are."""
    rising = np.sort(keys)
    return int(np.count_nonzero(rising[1:] != rising[:-1])) + bool(len(keys))


class Vocabulary:
    """Words by number, in order of first sight."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._words: list[str] = []

    def ids(self, text: Sequence[str]) -> list[int]:
        """The number of each word; new words get one."""
        for word in text:
            if word not in self._numbers:
                self._numbers[word] = len(self._words)
                self._words.append(word)
        return [self._numbers[word] for word in text]

    def words(self, ids: Ids) -> list[str]:
        """The words of numbers."""
        return [self._words[number] for number in ids]

    def ranks(self) -> Ids:
        """(V,) the place of each word among all in alphabetic order."""
        ranks = np.empty(len(self._words), dtype=np.int32)
        ranks[sorted(range(len(ranks)), key=self._words.__getitem__)] = np.arange(len(ranks), dtype=np.int32)
        return ranks

    def counted(self, side: Numbered) -> Iterator[tuple[str, int]]:
        """Each word with how often it stands in texts."""
        return zip(self._words, np.bincount(side.ids, minlength=len(self._words)).tolist(), strict=True)


class Grams(NamedTuple):
    """Runs of neighbouring words, in the order of the texts: each (G,).

    Attributes:
        keys: 64 bits that tell different runs apart.
        places: where each begins among all words.
        prompts: whose it is.
    """

    keys: NDArray[np.uint64]
    places: NDArray[np.int32]
    prompts: Ids

    def once_a_prompt(self) -> Grams:
        """Each different run of a prompt once."""
        bounds = np.flatnonzero(np.diff(self.prompts, prepend=-1, append=-1))
        ranges = itertools.pairwise(bounds)
        parts = [start + np.unique(self.keys[start:end], return_index=True)[1] for start, end in ranges]
        kept = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return Grams(self.keys[kept], self.places[kept], self.prompts[kept])

    def times(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """How often each of ``keys`` is among these."""
        mine = np.sort(self.keys)
        return np.searchsorted(mine, keys, side="right") - np.searchsorted(mine, keys, side="left")


class Numbered:
    """Texts of prompts, four bytes a word.

    Attributes:
        vocabulary: whose numbers they are.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self._prompts = vocabulary, 0
        self._ids, self._ends, self._owners = array("i"), array("i"), array("i")

    def add(self, texts: Sequence[Sequence[str]]) -> None:
        """The texts of the next prompt, each as its words."""
        for text in texts:
            self._ids.extend(self.vocabulary.ids(text))
            self._ends.append(len(self._ids))
            self._owners.append(self._prompts)
        self._prompts += 1

    def __len__(self) -> int:
        return self._prompts

    @property
    def ids(self) -> Ids:
        """(W,) the words of all texts."""
        return np.array(self._ids, dtype=np.int32)

    def grams(self, size: int) -> Grams:
        """All runs of ``size`` words; none goes over the end of a text."""
        ids, ends = self.ids, np.array(self._ends, dtype=np.int32)
        count = max(len(ids) - size + 1, 0)
        texts = np.searchsorted(ends, np.arange(count), side="right")  # of each place
        places = np.flatnonzero(np.arange(count) + size <= ends[texts]) if count else np.zeros(0, dtype=np.int64)
        keys = np.zeros(len(places), dtype=np.uint64)
        for at, factor in enumerate(_FACTORS[:size]):
            keys += ids[places + at].astype(np.uint64) * factor
        owners = np.array(self._owners, dtype=np.int32)
        return Grams(keys, places.astype(np.int32), owners[texts[places]])

    def any_holds(self, wanted: Ids) -> bool:
        """Whether all of these words stand in the texts of one prompt, in any order."""
        ids, left = self.ids, None
        for number in set(wanted.tolist()):
            texts = np.searchsorted(np.array(self._ends), np.flatnonzero(ids == number), side="right")
            prompts = set(np.array(self._owners)[texts].tolist())
            left = prompts if left is None else left & prompts
            if not left:
                return False
        return True

    def texts_at(self, places: NDArray[np.int32]) -> Iterator[Ids]:
        """The texts in which these places are, each once."""
        ids, ends = self.ids, np.array(self._ends, dtype=np.int64)
        for text in np.unique(np.searchsorted(ends, places, side="right")):
            yield ids[ends[text - 1] if text else 0 : ends[text]]
