"""Has a policy come to say the same to everybody? Variety over prompts at equal length, and phrases in every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rankalign.data.messages import text_of
from rankalign.data.records import CandidateSet
from rankalign.data.words import words
from rankalign.evaluation import drawn
from rankalign.evaluation.statistics import Array, Estimate, bootstrap, mean_interval, percentile_interval
from rankalign.evaluation.texts.lexical import ngrams

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
    cut = [_level(pair) for pair in pairs]
    columns = np.hstack([_worth([texts[side] for texts in cut]) for side in (0, 1)])
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


def _worth(sets: Sequence[Sequence[Sequence[str]]]) -> Array:
    """(P, 2): what each prompt's pairs of words are worth, and how many there are."""
    grams = [[gram for text in texts for gram in ngrams(text, 2)] for texts in sets]
    counts = Counter(gram for own in grams for gram in own)
    return np.array([[sum(1 / counts[gram] for gram in own), len(own)] for own in grams], dtype=np.float64)


def new_phrase(pairs: Sequence[Pair], seed: int = 0) -> Phrase | None:
    """The phrase whose share of prompts rose most; begin and end of an answer count as words of it.

    What stands in the prompt is copying and no phrase of the model's own.
    """
    asked = [set(words(_prompt(pair[0]))) for pair in pairs]
    sides = [[[_framed(r.words()) for r in drawn(pair[side])] for pair in pairs] for side in (0, 1)]
    size = _size([text for texts in sides[1] for text in texts])
    held = [[{gram for text in texts for gram in ngrams(text, size)} for texts in side] for side in sides]
    counts = [Counter(gram for own in side for gram in own) for side in held]
    # By its words where several rose alike: a set has no order. Prompts are asked about from the top on, and not
    # about every phrase, which would take as many steps as there are phrases times prompts.
    ranked = sorted(counts[1], key=lambda gram: (counts[1][gram] - counts[0][gram], gram), reverse=True)
    best = next((gram for gram in ranked if not any(prompt.issuperset(gram) for prompt in asked)), None)
    if best is None:
        return None
    before, after = (np.array([best in grams for grams in side], dtype=np.float64) for side in held)
    rise = mean_interval(after - before, seed=seed)
    text = _longest([text for texts in sides[1] for text in texts], best)
    return Phrase(text, float(before.mean()), float(after.mean()), rise)


def _prompt(record: CandidateSet) -> str:
    prompt = record.prompt
    return prompt if isinstance(prompt, str) else "\n".join(map(text_of, prompt))


def _framed(text: str) -> list[str]:
    return [_START, *words(text), _END]


def _size(texts: Sequence[Sequence[str]]) -> int:
    known = [len(word) for text in texts for word in text[1:-1]]
    return SIGNS if known and sum(known) < 2 * len(known) else PHRASE


def _longest(texts: Sequence[Sequence[str]], gram: tuple[str, ...]) -> str:
    """``gram`` and the words around it that nearly all texts that hold it share, without the frame."""
    holding = [text for text in texts if gram in set(ngrams(text, len(gram)))]
    while True:
        wider: Counter[tuple[str, ...]] = Counter()
        for text in holding:
            wider.update({more for more in ngrams(text, len(gram) + 1) if gram in (more[1:], more[:-1])})
        if not wider or wider.most_common(1)[0][1] < 0.9 * len(holding):
            return " ".join(word for word in gram if word not in (_START, _END))
        gram = wider.most_common(1)[0][0]
