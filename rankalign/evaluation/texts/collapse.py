"""Has a policy come to say the same to everybody? Variety over prompts at equal length, and phrases in every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankalign.data.messages import text_of
from rankalign.data.records import CandidateSet
from rankalign.data.words import words
from rankalign.evaluation import drawn
from rankalign.evaluation.statistics import Array, Estimate, bootstrap, mean_interval, percentile_interval
from rankalign.evaluation.texts.lexical import ngrams
from rankalign.evaluation.texts.numbered import Grams, Numbered, Vocabulary

Pair = tuple[CandidateSet, CandidateSet]
PHRASE, SIGNS = 3, 6  # words of the shortest phrase; signs where most words are one sign long
_START, _END = "<", ">"  # no words: they hold no letter


class Phrase(NamedTuple):
    """The words that more answers hold than before, and the share of prompts where they do."""

    text: str
    before: float
    after: float
    rise: Estimate


def variety_drop(pairs: Sequence[Pair], seed: int = 0) -> tuple[float, float, Estimate] | None:
    """distinct-2 before and after over as many draws of as many words of each prompt, and its fall with an interval.

    A longer text repeats more words, so answers are cut to the shorter side's length. A pair of words that stands k
    times in a set is worth 1/k wherever it stands: so distinct-2 is a ratio of sums over prompts, whose bootstrap takes
    the set as it is (resampled prompts would repeat their words by being drawn twice).

    Returns:
        None where no prompt has two words on both sides.
    """
    vocabulary = Vocabulary()
    sides = (Numbered(vocabulary), Numbered(vocabulary))
    for pair in pairs:
        for side, texts in zip(sides, _level(pair), strict=True):
            side.add(texts)
    columns = np.hstack([_worth(side) for side in sides])
    if not columns[:, 1].sum() or not columns[:, 3].sum():
        return None
    before, after = (columns[:, k].sum() / columns[:, k + 1].sum() for k in (0, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = bootstrap(columns, lambda s: s[:, 0] / s[:, 1] - s[:, 2] / s[:, 3], seed=seed)
    return before, after, Estimate(before - after, percentile_interval(draws[np.isfinite(draws)]))


def _level(pair: Pair) -> tuple[list[list[str]], list[list[str]]]:
    """Words of both sides' answers: as many draws, and as many words on the mean, as the shorter side has."""
    sides = [[words(response.words()) for response in drawn(record)] for record in pair]
    draws = min(map(len, sides))
    sides = [side[:draws] for side in sides]
    least = min(sum(map(len, side)) // max(draws, 1) for side in sides)
    return [text[:least] for text in sides[0]], [text[:least] for text in sides[1]]


def _worth(side: Numbered) -> Array:
    """(P, 2): what each prompt's pairs of words are worth, and how many there are."""
    grams = side.grams(2)
    _, which, counts = np.unique(grams.keys, return_inverse=True, return_counts=True)
    worth = np.bincount(grams.prompts, weights=1 / counts[which], minlength=len(side))
    return np.column_stack([worth, np.bincount(grams.prompts, minlength=len(side))])


def new_phrase(pairs: Sequence[Pair], seed: int = 0) -> Phrase | None:
    """The phrase whose share of prompts rose most; begin and end of an answer count as words of it.

    What stands in the prompt is copying and no phrase of the model's own.
    """
    vocabulary = Vocabulary()
    asked, *sides = (Numbered(vocabulary) for _ in range(3))
    signs = count = 0
    for pair in pairs:
        asked.add([words(_prompt(pair[0]))])
        for side, record in zip(sides, pair, strict=True):
            side.add([[_START, *words(response.words()), _END] for response in drawn(record)])
    for word, times in vocabulary.counted(sides[1]):
        if word not in (_START, _END):
            signs, count = signs + len(word) * times, count + times
    size = SIGNS if count and signs < 2 * count else PHRASE
    grams = sides[1].grams(size)
    held = [sides[0].grams(size).once_a_prompt(), grams.once_a_prompt()]
    ids, ranked = sides[1].ids, _ranked(sides[1], vocabulary, size, held)
    found = next((at for at in ranked if not asked.any_holds(ids[at : at + size])), None)
    if found is None:
        return None
    best = grams.keys[np.searchsorted(grams.places, found)]
    before, after = (_which(side.prompts[side.keys == best], len(pairs)) for side in held)
    rise = mean_interval(after - before, seed=seed)
    holding = [vocabulary.words(text) for text in sides[1].texts_at(grams.places[grams.keys == best])]
    text = _longest(holding, tuple(vocabulary.words(ids[found : found + size])))
    return Phrase(text, float(before.mean()), float(after.mean()), rise)


def _which(prompts: NDArray[np.int32], count: int) -> Array:
    """(P,) 1 for the prompts that are named, 0 for the others."""
    found = np.zeros(count)
    found[prompts] = 1
    return found


def _ranked(side: Numbered, vocabulary: Vocabulary, size: int, held: Sequence[Grams]) -> Iterator[int]:
    """Where each different phrase of ``side`` stands first, by how many more prompts hold it than before, most first;
    by its words where several rose alike."""
    grams = side.grams(size)
    keys, first = np.unique(grams.keys, return_index=True)
    places = grams.places[first]
    del grams, first
    rises = held[1].times(keys) - held[0].times(keys)
    ranks = vocabulary.ranks()
    for rise in np.unique(rises)[::-1]:
        level = places[rises == rise]
        columns = [ranks[side.ids[level + at]] for at in range(size)]
        yield from map(int, level[np.lexsort(columns[::-1])[::-1]])


def _prompt(record: CandidateSet) -> str:
    prompt = record.prompt
    return prompt if isinstance(prompt, str) else "\n".join(map(text_of, prompt))


def _longest(texts: Sequence[Sequence[str]], gram: tuple[str, ...]) -> str:
    """``gram``, which all texts hold, and the words around it that nearly all of them share, without the frame."""
    while True:
        wider: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            wider.update({more for more in ngrams(text, len(gram) + 1) if gram in (more[1:], more[:-1])})
        if not wider or wider.most_common(1)[0][1] < 0.9 * len(texts):
            return " ".join(word for word in gram if word not in (_START, _END))
        gram = wider.most_common(1)[0][0]
