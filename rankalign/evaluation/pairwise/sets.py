"""Reviews looked at as a set: what stands there twice, what is missing, what is unknown. Each is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rankalign.evaluation.pairwise.reviews import Review
from rankalign.evaluation.tables import some

Key = tuple[str, str, str]
"""Question, first system, second system."""


def without_duplicates(reviews: Sequence[Review]) -> tuple[list[Review], int]:
    """The reviews less those that stand there again, in all that they say, and how many those were."""
    kept = list(dict.fromkeys(reviews))
    return kept, len(reviews) - len(kept)


def repeats(reviews: Iterable[Review]) -> dict[Key, list[Review]]:
    """Reviews of one question in one order, where there are several: a judge asked again, or several judges."""
    found: dict[Key, list[Review]] = {}
    for review in reviews:
        found.setdefault((review.question, review.first, review.second), []).append(review)
    return {key: own for key, own in found.items() if len(own) > 1}


def repeatability(signs: Iterable[Sequence[int]]) -> float | None:
    """How alike a judge judges when it is asked again: the share of equal verdicts among each two of the same judge.

    Args:
        signs: of each question and order judged several times, who won by each review (1, 0 or -1).

    Returns:
        The mean over questions and orders; None where nothing was judged twice.
    """
    shares = []
    for own in signs:
        if pairs := [a == b for a, b in combinations(own, 2)]:
            shares.append(sum(pairs) / len(pairs))
    return sum(shares) / len(shares) if shares else None


def remarks(reviews: Sequence[Review], duplicates: int, categories: Mapping[str, str]) -> list[str]:
    """What a reader of the figures must know of the set.

    Args:
        reviews: less the duplicates.
        duplicates: how many there were.
        categories: by question, of the file of questions; empty without one.
    """
    found = []
    if duplicates:
        found.append(f"{duplicates} reviews stand in the file twice and were dropped")
    if again := repeats(reviews):
        names = some(list(dict.fromkeys(key[0] for key in again)))
        judges = sorted({review.reviewer for own in again.values() for review in own})
        by = f" by {some(judges)}" if len(judges) > 1 else ""
        found.append(f"{len(again)} questions were judged several times in one order{by} ({names}): their means count")
    return [*found, *_uneven(reviews), *_questions(reviews, categories)]


def _uneven(reviews: Sequence[Review]) -> list[str]:
    """Questions that one order of a pair has and the other lacks, and questions that one pair lacks."""
    orders: dict[frozenset[str], dict[str, set[str]]] = {}
    for review in reviews:
        own = orders.setdefault(frozenset((review.first, review.second)), {})
        own.setdefault(review.first, set()).add(review.question)
    found, everything = [], dict.fromkeys(review.question for review in reviews)
    for pair, own in orders.items():
        name = " and ".join(sorted(pair))
        asked = set().union(*own.values())
        if half := [q for q in everything if 0 < sum(q in order for order in own.values()) < len(own)]:
            found.append(f"{name}: {len(half)} questions were judged in one order only ({some(half)}) and are left out")
        others = {review.question for review in reviews if {review.first, review.second} != pair}
        lacking = [q for q in everything if q not in asked]
        if lacking and asked & others:  # pairs that share no question were never meant to
            found.append(f"{name}: {len(lacking)} questions of the file were not judged ({some(lacking)})")
    return found


def _questions(reviews: Sequence[Review], categories: Mapping[str, str]) -> list[str]:
    if not categories:
        return []
    asked, found = dict.fromkeys(review.question for review in reviews), []
    if missing := [question for question in categories if question not in asked]:
        found.append(f"{len(missing)} questions of the question file have no review: {some(missing)}")
    if unknown := [question for question in asked if question not in categories]:
        found.append(f"{len(unknown)} reviewed questions are not in the question file: {some(unknown)}")
    return found


def beyond_scale(reviews: Sequence[Review], stated: Sequence[Any]) -> str:
    """A remark on points beyond the scale, which count as not parsed; empty where there are none.

    Args:
        reviews: the reviews.
        stated: what each states, whether on its scale or not.
    """
    wrong = [r for r, points in zip(reviews, stated, strict=True) if points and r.within(points) is None]
    if not wrong:
        return ""
    low, high = wrong[0].scale
    names = some(list(Counter(review.question for review in wrong)))
    return f"{len(wrong)} reviews state points beyond {low:g} to {high:g} and count as not parsed (questions {names})"
