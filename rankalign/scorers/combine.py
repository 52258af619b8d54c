"""Several judges' scores as one: each judge brought to a scale of its own, then a weighted mean, or the least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.errors import InputError
from rankalign.registry import did_you_mean

RULES = ("mean", "min", "rank")
NORMALIZE = ("file", "prompt", "none")
MISSING = ("null", "rest")
_ONE_OF = {"rule": RULES, "normalize": NORMALIZE, "missing": MISSING}


@dataclass(frozen=True)
class Combination:
    """How scores are combined.

    Attributes:
        name: key of the combined score.
        judges: weight by the name of a judge; none are all that the file has, with weight 1.
        rule: ``mean``, the weighted mean of normalised scores; ``min``, the least of them; ``rank``, the weighted mean
            of each judge's ranks within the prompt, from 0 (worst) to 1 (best), ties sharing the mean of their places.
        normalize: ``file`` takes off a judge's mean over all records and divides by its standard deviation (of the
            population); ``prompt`` does so within each record; ``none`` takes scores as they are. Rule ``rank`` needs
            none of them.
        missing: where a judge gave no score: ``null`` gives none either, ``rest`` goes by the other judges.

    Raises:
        InputError: an option is wrong; the message names it.
    """

    name: str
    judges: dict[str, float] = field(default_factory=dict)
    rule: str = "mean"
    normalize: str = ""
    missing: str = "null"

    def __post_init__(self) -> None:
        if self.rule == "rank" and self.normalize:
            raise InputError("normalize: rule rank compares within the prompt and takes no other scale")
        object.__setattr__(self, "normalize", self.normalize or ("none" if self.rule == "rank" else "file"))
        for option, known in _ONE_OF.items():
            if (given := getattr(self, option)) not in known:
                raise InputError(f"{option}: {given!r} is unknown{did_you_mean(given, known)}")
        if not self.name.strip():
            raise InputError("name: the combined score needs a name")
        if self.name in self.judges:
            raise InputError(f"name: {self.name!r} is a judge already; give the combined score another name")
        for judge, weight in self.judges.items():
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"judges: the weight of {judge!r} must be above 0, found {weight}")
        if self.rule == "min" and len(set(self.judges.values())) > 1:
            raise InputError("judges: rule min knows no weights; the least of several scores is one of them")


@dataclass
class Spread:
    """Mean and variance of a judge's scores as they pass (Welford 1962), each response once whatever its count."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, score: float) -> None:
        """One more score."""
        self.count += 1
        step = score - self.mean
        self.mean += step / self.count
        self.squares += step * (score - self.mean)
        self.low, self.high = min(self.low, score), max(self.high, score)

    @property
    def deviation(self) -> float:
        """Standard deviation of the population; 0 where all are equal, also where rounding says otherwise."""
        return 0.0 if self.low >= self.high else math.sqrt(self.squares / self.count)

    def scaled(self, score: float) -> float:
        """How many deviations above the mean; 0 where all scores are equal."""
        return (score - self.mean) / self.deviation if self.deviation else 0.0


def spreads(sets: Iterable[CandidateSet], how: Combination) -> dict[str, Spread]:
    """Of each judge to be combined, count, mean and spread over all records.

    Raises:
        InputError: a judge is not there, the name is taken, or scores are too large to square.
    """
    found: dict[str, Spread] = {}
    for record in sets:
        for response in record.responses:
            for judge, score in response.scores.items():
                spread = found.setdefault(judge, Spread())
                if score is not None:
                    spread.add(score)
    if how.name in found:
        raise InputError(f"name: {how.name!r} is a judge of the file already; give the combined score another name")
    wanted = how.judges or dict.fromkeys(found, 1.0)
    if not wanted:
        raise InputError("no response has a score to combine")
    for judge in wanted:
        if judge not in found or not found[judge].count:
            have = ", ".join(sorted(found)) or "no judge"
            what = "gave no score at all" if judge in found else f"is not in the file, which has {have}"
            raise InputError(f"judges: {judge!r} {what}")
        if not math.isfinite(found[judge].squares):
            raise InputError(f"judges: scores of {judge!r} are too large to normalise, up to {found[judge].high:g}")
    return {judge: found[judge] for judge in wanted}


def combined(record: CandidateSet, how: Combination, known: dict[str, Spread]) -> list[float | None]:
    """The combined score of each response of a record; never NaN.

    Args:
        record: with the judges' scores.
        how: rule, scale and weights.
        known: of :func:`spreads`.

    Raises:
        InputError: scores as they are add up to more than a float holds.
    """
    columns = {j: _scaled([r.scores.get(j) for r in record.responses], how, known[j]) for j in known}
    return [_one({j: column[i] for j, column in columns.items()}, how, record) for i in range(len(record.responses))]


def _one(scores: dict[str, float | None], how: Combination, record: CandidateSet) -> float | None:
    there = {judge: score for judge, score in scores.items() if score is not None}
    if not there or (how.missing == "null" and len(there) < len(scores)):
        return None
    if how.rule == "min":
        return min(there.values())
    weights = [how.judges.get(judge, 1.0) for judge in there]
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # of weights near the largest float, sums are none
    value = math.fsum(share / math.fsum(shares) * score for share, score in zip(shares, there.values(), strict=True))
    if not math.isfinite(value):
        raise InputError(f"record {record.id!r}: its scores are too large to combine")
    return value


def _scaled(scores: Sequence[float | None], how: Combination, spread: Spread) -> list[float | None]:
    """One judge's scores of a record on their common scale."""
    known = [score for score in scores if score is not None]
    if how.rule == "rank":
        return [None if score is None else _place(score, known) for score in scores]
    if how.normalize == "none":
        return list(scores)
    if how.normalize == "prompt":
        unit = max(map(abs, known), default=0.0) or 1.0  # squares of what is at most 1 do not overflow
        spread = Spread()
        for score in known:
            spread.add(score / unit)
        scores = [None if score is None else score / unit for score in scores]
    return [None if score is None else spread.scaled(score) for score in scores]


def _place(score: float, known: Sequence[float]) -> float:
    """Share of the others that are worse, ties counting half; 0.5 where there is no other."""
    if len(known) < 2:
        return 0.5
    worse, tied = sum(other < score for other in known), sum(other == score for other in known) - 1
    return (worse + tied / 2) / (len(known) - 1)


def parse_judges(text: str) -> dict[str, float]:
    """Weights of ``a=2,b``: 2 and 1.

    Raises:
        InputError: a name stands twice or is empty, or a weight is no number.
    """
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, weight = part.strip().rpartition("=") if "=" in part else (part.strip(), "", "1")
        if not name or name in found:
            raise InputError(f"judges: {part.strip()!r} has no name" if not name else f"judges: {name!r} stands twice")
        try:
            found[name] = float(weight)
        except ValueError:
            raise InputError(f"judges: the weight of {name!r} is no number: {weight!r}") from None
    return found


def facts(known: dict[str, Spread]) -> dict[str, Any]:
    """What the scale was, for the manifest."""
    return {judge: {"scores": s.count, "mean": s.mean, "deviation": s.deviation} for judge, s in known.items()}
