"""Do several raters order candidates alike? Kendall's tau-b and Krippendorff's alpha over whole rankings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from rankalign.data.records import CandidateSet, judges
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, Row
from rankalign.evaluation.statistics import Estimate, mean_interval
from rankalign.scorers.aggregate import kendall_tau, krippendorff_alpha

Pair = tuple[str, str]


def evaluate_raters(sets: Sequence[CandidateSet], raters: Sequence[str], seed: int = 0) -> EvalResult:
    """How well the orders agree that ``raters`` (people, reward models, judges) give to the candidates.

    ``tau_b`` is Kendall's tau-b (1945) of two raters over the responses of one prompt that both scored, the mean over
    pairs of raters and then over prompts; with three raters or more each pair also stands by itself. Rankings that are
    all one tie have no tau-b; ``undefined`` counts such pairs of rankings. ``krippendorff_alpha`` (2004) has a response
    as its unit, and as its rating the share of the rater's other responses to that prompt that stand below it, ties
    half, so that scales do not matter; disagreement is the squared difference. Intervals resample prompts.

    Args:
        sets: records whose responses carry scores by the raters; a missing score stays missing.
        raters: names of at least two judges.
        seed: seed of the bootstrap.

    Raises:
        InputError: fewer than two raters, one who scored nothing, or no prompt that two of them ordered.
    """
    known = judges(sets)
    if len(set(raters)) < 2 or len(set(raters)) < len(raters):
        raise InputError(f"agreement needs two raters or more, each named once (found {', '.join(raters) or 'none'})")
    if missing := [name for name in raters if name not in known]:
        raise InputError(f"no score by rater {missing[0]!r} (judges in the data: {', '.join(known) or 'none'})")
    rows = [_row(record, list(combinations(raters, 2))) for record in sets]
    full = [row for row in rows if row["taus"]]
    if not full:
        raise InputError(f"no prompt was ordered by two of {', '.join(raters)}")
    found = {"tau_b": mean_interval([sum(row["taus"].values()) / len(row["taus"]) for row in full], seed=seed)}
    if len(raters) > 2:
        found |= _by_pair(full, seed)
    metrics = {name: estimate.value for name, estimate in found.items()}
    places = [unit for record in sets for unit in zip(*(_places(record.scores(name)) for name in raters), strict=True)]
    if (alpha := krippendorff_alpha(places, interval=True)) is not None:
        metrics["krippendorff_alpha"] = alpha
    metrics["undefined"] = float(sum(row["undefined"] for row in rows))
    return EvalResult(metrics, len(full), {name: estimate.interval for name, estimate in found.items()}, rows)


def _row(record: CandidateSet, pairs: Sequence[Pair]) -> Row:
    """Tau-b by pair of raters, and how many pairs share two responses or more yet have none."""
    taus, undefined = {}, 0
    for a, b in pairs:
        scores = zip(record.scores(a), record.scores(b), strict=True)
        both = [(x, y) for x, y in scores if x is not None and y is not None]
        tau = kendall_tau([x for x, _ in both], [y for _, y in both])
        if tau is not None:
            taus[f"{a}, {b}"] = tau
        undefined += tau is None and len(both) > 1
    return {"id": record.id, "taus": taus, "undefined": undefined}


def _by_pair(rows: Sequence[Row], seed: int) -> dict[str, Estimate]:
    names = list(dict.fromkeys(name for row in rows for name in row["taus"]))
    taus = {name: [row["taus"][name] for row in rows if name in row["taus"]] for name in names}
    return {f"tau_b ({name})": mean_interval(values, seed=seed) for name, values in taus.items()}


def _places(scores: Sequence[float | None]) -> list[float | None]:
    """The share of the other scored responses that stand below each, ties half; None without a score or others."""
    known = [score for score in scores if score is not None]
    if len(known) < 2:
        return [None] * len(scores)

    def place(score: float) -> float:
        return (sum(x < score for x in known) + (known.count(score) - 1) / 2) / (len(known) - 1)

    return [None if score is None else place(score) for score in scores]
