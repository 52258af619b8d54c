"""Lost variety and new phrases by numbers of words, against the same with tuples of words and dictionaries."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from rankalign.data.records import CandidateSet, Response
from rankalign.data.words import words
from rankalign.evaluation.statistics import mean_interval
from rankalign.evaluation.texts.collapse import PHRASE, SIGNS, new_phrase, variety_drop
from rankalign.evaluation.texts.lexical import ngrams
from rankalign.evaluation.texts.numbered import Numbered, Vocabulary

Pair = tuple[CandidateSet, CandidateSet]
LATIN, CHINESE = [f"w{n}" for n in range(40)], [chr(0x4E00 + n) for n in range(60)]


def drawn_pairs(seed: int, stock: str = "", letters: list[str] = LATIN) -> list[Pair]:
    draw, blank = random.Random(seed), " " if letters is LATIN else ""

    def text(most: int) -> str:
        return blank.join(draw.choices(letters, k=draw.randint(0, most)))

    found = []
    for n in range(60):
        prompt = text(8) or "w1"
        before = [Response(text(12), count=draw.randint(1, 2)) for _ in range(draw.randint(1, 3))]
        after = [Response(blank.join([text(5), stock if draw.random() < 0.8 else "", text(5)])) for _ in range(2)]
        found.append((CandidateSet(str(n), prompt, before), CandidateSet(str(n), prompt, after)))
    return found


def texts_of(record: CandidateSet) -> list[str]:
    return [response.text for response in record.responses for _ in range(response.count)]


def phrase_by_hand(pairs: list[Pair]) -> tuple[tuple[str, ...], float, float]:
    """The phrase itself, not made longer, and its shares."""
    sides = [[[["<", *words(t), ">"] for t in texts_of(pair[k])] for pair in pairs] for k in (0, 1)]
    lengths = [len(word) for texts in sides[1] for text in texts for word in text[1:-1]]
    size = SIGNS if sum(lengths) < 2 * len(lengths) else PHRASE
    held = [[{gram for text in texts for gram in ngrams(text, size)} for texts in side] for side in sides]
    counts = [Counter(gram for own in side for gram in own) for side in held]
    asked = [set(words(str(pair[0].prompt))) for pair in pairs]
    fit = [gram for gram in counts[1] if not any(prompt >= set(gram) for prompt in asked)]
    best = max(fit, key=lambda gram: (counts[1][gram] - counts[0][gram], gram))
    return best, counts[0][best] / len(pairs), counts[1][best] / len(pairs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("stock", "letters"), [("so it goes then", LATIN), ("", LATIN), ("一二三四五六七", CHINESE), ("", CHINESE)]
)
def test_the_phrase_is_that_of_a_search_by_tuples(seed: int, stock: str, letters: list[str]) -> None:
    pairs = drawn_pairs(seed, stock, letters)
    found, (gram, before, after) = new_phrase(pairs), phrase_by_hand(pairs)
    assert found is not None
    assert " ".join(word for word in gram if word not in "<>") in found.text
    assert (found.before, found.after) == (before, after)
    both = [(gram in _grams(x, len(gram)), gram in _grams(y, len(gram))) for x, y in pairs]
    assert found.rise == mean_interval(np.array([float(y) - float(x) for x, y in both]), seed=0)


def _grams(record: CandidateSet, size: int) -> set[tuple[str, ...]]:
    return {gram for text in texts_of(record) for gram in ngrams(["<", *words(text), ">"], size)}


@pytest.mark.parametrize("seed", range(4))
def test_variety_is_that_of_a_count_by_tuples(seed: int) -> None:
    pairs = drawn_pairs(seed, "so it goes then")
    shares = []
    cut: list[list[list[list[str]]]] = [[], []]
    for pair in pairs:
        sides = [[words(text) for text in texts_of(record)] for record in pair]
        sides = [side[: min(map(len, sides))] for side in sides]
        least = min(sum(map(len, side)) // len(side) for side in sides)
        for k in (0, 1):
            cut[k].append([text[:least] for text in sides[k]])
    for side in cut:
        grams = [gram for texts in side for text in texts for gram in ngrams(text, 2)]
        shares.append(len(set(grams)) / len(grams))
    found = variety_drop(pairs)
    assert found is not None
    assert found[:2] == pytest.approx(shares, rel=1e-12)
    assert found[2].value == pytest.approx(shares[0] - shares[1], rel=1e-9)


def test_where_nothing_is_said_nothing_is_found() -> None:
    empty = [(CandidateSet(str(n), "p", [Response("")]), CandidateSet(str(n), "p", [Response("")])) for n in range(6)]
    assert variety_drop(empty) is None
    assert new_phrase(empty) is None


def test_runs_end_with_their_text_and_count_once_a_prompt() -> None:
    side = Numbered(Vocabulary())
    for texts in (["a b a b", "", "c"], [], ["a b", "b a b"]):
        side.add([text.split() for text in texts])
    grams = side.grams(2)
    names = [" ".join(side.vocabulary.words(side.ids[at : at + 2])) for at in grams.places]
    assert names == ["a b", "b a", "a b", "a b", "b a", "a b"]
    assert grams.prompts.tolist() == [0, 0, 0, 2, 2, 2]
    once = grams.once_a_prompt()
    assert once.prompts.tolist() == [0, 0, 2, 2]
    assert sorted(once.times(np.unique(grams.keys)).tolist()) == [2, 2]
    assert side.any_holds(np.array([0, 2], dtype=np.int32))
    assert not side.any_holds(np.array([1, 2, 7], dtype=np.int32))
