"""Pairwise scores from stored reviews: sums, win rates, and what the order of the two answers did to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankalign.data.shares import clustered_wilson
from rankalign.errors import InputError
from rankalign.evaluation import Row
from rankalign.evaluation.pairwise import sets
from rankalign.evaluation.pairwise.reviews import CLASSES, Review, first_line, parse_class, parse_tolerant
from rankalign.evaluation.pairwise.scores import Comparison, System, summarise
from rankalign.evaluation.statistics import cluster_means, mean_interval
from rankalign.registry import did_you_mean
from rankalign.scorers.verdicts import Scores

PARSERS = ("tolerant", "strict", "stored")
ONE_ORDER = "each pair was judged in one order only, so the judge's preference for a position is part of the result"


@dataclass(frozen=True)
class Parsed:
    """A review with the points it gives its first and second system; None where none were found."""

    review: Review
    points: Scores | None


def compare_reviews(
    reviews: Sequence[Review],
    parser: str = "",
    baseline: str = "",
    categories: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Comparison:
    """Sums, win rates and order effects of stored reviews; no judge is called.

    A question counts for a pair if it has points in every order that the pair was judged in. Its points are then the
    mean over the orders; of two verdicts that differ they are half and half, a tie. Reviews without points are in no
    sum.

    Args:
        reviews: as :func:`rankalign.evaluation.pairwise.reviews.read_reviews` gives them.
        parser: ``tolerant``: the text, read leniently; where the file's own score differs, people corrected it, so it
            counts, the difference is listed in ``disagreements`` and the sums by text stand beside. ``strict``: the
            published rule, the first line. ``stored``: the file's scores. Empty takes ``stored`` where there are any.
        baseline: the system to name second; empty takes the one that stands in most pairs.
        categories: category by question, for sums by category.
        seed: seed of the bootstrap.

    Raises:
        InputError: no review, an unknown parser, or a pair without any scored question.
    """
    if not reviews:
        raise InputError("there are no reviews to compare")
    parser = parser or ("stored" if any(review.stored for review in reviews) else "tolerant")
    if parser not in PARSERS:
        raise InputError(f"unknown parser {parser!r}{did_you_mean(parser, PARSERS)}")
    known = list(dict.fromkeys(name for review in reviews for name in (review.first, review.second)))
    if baseline and baseline not in known:
        raise InputError(f"--baseline {baseline!r} is not a system of the reviews{did_you_mean(baseline, known)}")
    reviews, duplicates = sets.without_duplicates(reviews)
    parsed = [Parsed(review, find_points(review, parser)) for review in reviews]
    pairs = [Pair(a, b, own) for (a, b), own in _by_pair(parsed, baseline).items()]
    readable = [pair for pair in pairs if pair.points] or pairs[:1]  # with none at all, the first says so
    systems = [_system(pair, parser, categories or {}, seed) for pair in readable]
    audit = _audit(pairs, seed) | {"duplicates": duplicates}
    stated = [_stated(r, parser) or (first_line(r.text.lstrip()) if r.graded else None) for r in reviews]
    beyond = sets.beyond_scale(reviews, stated)
    audit["remarks"] += [*sets.remarks(reviews, duplicates, categories or {}), *([beyond] if beyond else [])]
    audit["remarks"] += [f"{p.a} and {p.b}: none of {p.asked} questions has points" for p in pairs if not p.points]
    return Comparison(systems, parser, _consistency(pairs), [row for p in pairs for row in p.rows()], audit)


def find_points(review: Review, parser: str) -> Scores | None:
    """Points of first and second by one of :data:`PARSERS`; a review without text always has its stored ones."""
    return review.within(_stated(review, parser))


def _stated(review: Review, parser: str) -> Scores | None:
    """What a review states, whether it is on the scale or not."""
    if parser == "stored" or not review.text:
        return review.stored
    if parser == "strict" and review.graded:
        return first_line(review.text)
    text = text_points(review)
    return review.stored if parser == "tolerant" and text and review.stored else text


def text_points(review: Review) -> Scores | None:
    """Points as the review's text states them, read leniently."""
    return review.within(parse_tolerant(review.text) if review.graded else parse_class(review.text))


def _by_pair(parsed: Iterable[Parsed], baseline: str) -> dict[tuple[str, str], list[Parsed]]:
    """Reviews by (system, system it is compared with), in order of first sight."""
    found: dict[frozenset[str], list[Parsed]] = {}
    for item in parsed:
        found.setdefault(frozenset((item.review.first, item.review.second)), []).append(item)
    seen = Counter(name for pair in found for name in pair)
    named: dict[tuple[str, str], list[Parsed]] = {}
    for own in found.values():
        a, b = own[0].review.first, own[0].review.second
        swap = a == baseline or (b != baseline and seen[a] > seen[b])
        named[(b, a) if swap else (a, b)] = own
    return named


class Pair:
    """All reviews of two systems.

    Attributes:
        a: the first system.
        b: the second.
        parsed: the reviews with their points.
        orders: by order (True: a stands first), by question, the points of (a, b) in every review that has them.
        points: points of (a, b) of each question that counts.
        asked: how many questions there are.
    """

    def __init__(self, a: str, b: str, parsed: Sequence[Parsed]) -> None:
        self.a, self.b, self.parsed = a, b, parsed
        self.orders: dict[bool, dict[str, list[Scores]]] = {}
        for item in parsed:
            straight = item.review.first == a
            own = self.orders.setdefault(straight, {}).setdefault(item.review.question, [])
            if item.points:
                own.append(item.points if straight else (item.points[1], item.points[0]))
        questions = list(dict.fromkeys(item.review.question for item in parsed))
        complete = {q: [own.get(q, []) for own in self.orders.values()] for q in questions}
        self.graded = parsed[0].review.graded
        self.points = {q: self._combine(found) for q, found in complete.items() if all(found)}
        self.asked = len(questions)

    def _combine(self, orders: list[list[Scores]]) -> Scores:
        means = [_mean(own) for own in orders]
        return CLASSES["3"] if not self.graded and len(set(means)) > 1 else _mean(means)

    def both_orders(self) -> dict[str, tuple[Scores, Scores]]:
        """By question, points of (a, b) with a first and with b first; empty where only one order was judged."""
        if len(self.orders) < 2:
            return {}
        return {q: (_mean(self.orders[True][q]), _mean(self.orders[False][q])) for q in self.points}

    def rows(self) -> list[Row]:
        """One entry a question, for tables and reports."""
        return [{"a": self.a, "b": self.b, "id": q, "points_a": p[0], "points_b": p[1]} for q, p in self.points.items()]


def _mean(pairs: Sequence[Scores]) -> Scores:
    return math.fsum(p[0] for p in pairs) / len(pairs), math.fsum(p[1] for p in pairs) / len(pairs)


# --- one pair ----------------------------------------------------------------------------------------------------


def _system(pair: Pair, parser: str, categories: Mapping[str, str], seed: int) -> System:
    system = summarise(pair.a, pair.b, list(pair.points.values()), pair.asked - len(pair.points), seed=seed)
    system.extra["orders"] = len(pair.orders)
    if pair.graded:
        system.extra["percent"] = percent(pair)
    if parser == "tolerant" and pair.graded:
        texts = Pair(pair.a, pair.b, [Parsed(p.review, text_points(p.review)) for p in pair.parsed]).points.values()
        system.extra |= {"text_sum_a": math.fsum(p[0] for p in texts), "text_sum_b": math.fsum(p[1] for p in texts)}
    if categories:
        system.extra["categories"] = _by_category(pair, categories, seed)
    return system


def percent(pair: Pair) -> float:
    """The sum of a as percent of the sum of b over the scored reviews of an order, mean over the orders (QLoRA)."""
    shares = []
    for own in pair.orders.values():
        found = [scores for question in own.values() for scores in question]
        if below := math.fsum(scores[1] for scores in found):
            shares.append(100 * math.fsum(scores[0] for scores in found) / below)
    return math.fsum(shares) / len(shares)


def _by_category(pair: Pair, categories: Mapping[str, str], seed: int) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Scores]] = {}
    for question, scores in pair.points.items():
        groups.setdefault(categories.get(question, "other"), []).append(scores)
    keys = ("n", "sum_a", "sum_b", "win", "tie", "loss")
    tables = {name: summarise(pair.a, pair.b, own, seed=seed).as_dict() for name, own in groups.items()}
    return {name: {key: row[key] for key in keys} for name, row in tables.items()}


# --- all pairs ---------------------------------------------------------------------------------------------------


def _consistency(pairs: Sequence[Pair]) -> float | None:
    """Share of questions on which both orders prefer the same system, or neither."""
    both = [orders for pair in pairs for orders in pair.both_orders().values()]
    same = sum(_sign(x) == _sign(y) for x, y in both)
    return same / len(both) if both else None


def _sign(scores: Scores) -> int:
    return (scores[0] > scores[1]) - (scores[0] < scores[1])


def _audit(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    """Parse rate, preference for a position, disagreements of text and stored score, remarks."""
    parsed = [item for pair in pairs for item in pair.parsed]
    signs = [_sign(item.points) for item in parsed if item.points]
    return {
        "reviews": len(parsed),
        "parse_rate": sum(item.points is not None for item in parsed) / len(parsed),
        "first_of_decided": [signs.count(1), signs.count(1) + signs.count(-1)],
        "position": _position([pair for pair in pairs if len(pair.orders) == 2], seed),
        "disagreements": [_disagreement(item.review) for item in parsed if _differs(item.review)],
        "repeatability": sets.repeatability(_again(parsed)),
        "remarks": [] if all(len(pair.orders) == 2 for pair in pairs) else [ONE_ORDER],
    }


def _again(parsed: Sequence[Parsed]) -> list[list[int]]:
    """Who won, by every question, order and reviewer that has several reviews."""
    found: dict[tuple[str, ...], list[int]] = {}
    for item in parsed:
        if item.points:
            review = item.review
            key = (review.question, review.first, review.second, review.reviewer)
            found.setdefault(key, []).append(_sign(item.points))
    return list(found.values())


def _position(pairs: Sequence[Pair], seed: int) -> dict[str, Any] | None:
    """What standing first is worth, from pairs judged in both orders; with one order it cannot be told from quality.

    ``first_wins`` is the share of decided reviews that prefer the first answer, ``effect`` the mean lead of the first
    answer in points, in which the systems' difference cancels; both intervals keep a question's reviews together.
    """
    first: Counter[str] = Counter()
    decided: Counter[str] = Counter()
    for item in (item for pair in pairs for item in pair.parsed):
        if item.points and (sign := _sign(item.points)):
            decided[item.review.question] += 1
            first[item.review.question] += sign > 0
    leads: dict[str, list[float]] = {}
    for pair in pairs:
        for question, (x, y) in pair.both_orders().items():
            leads.setdefault(question, []).append(((x[0] - x[1]) + (y[1] - y[0])) / 2)
    bounds = clustered_wilson([first[q] for q in decided], list(decided.values()))
    if not leads or bounds is None:
        return None
    effect = mean_interval(cluster_means(list(leads.values())), seed=seed)
    return {
        "first_wins": first.total() / decided.total(),
        "first_wins_ci95": list(bounds),
        "effect": effect.value,
        "effect_ci95": list(effect.interval),
    }


def _differs(review: Review) -> bool:
    text = text_points(review) if review.text else None
    return text is not None and review.stored is not None and text != review.stored


def _disagreement(review: Review) -> Row:
    row = {"question": review.question, "first": review.first, "second": review.second}
    return row | {"stored": list(review.stored or ()), "text": list(text_points(review) or ())}
