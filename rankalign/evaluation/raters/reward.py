"""Rewards of responses: average with its interval, statistics of candidates, best-of-n."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from rankalign.data.records import CandidateSet, by_id
from rankalign.data.templates import cut_at_stop
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, drawn, scored
from rankalign.evaluation.columns import Columns
from rankalign.evaluation.statistics import mean_intervals
from rankalign.scorers import Scorer


def evaluate_reward(
    sets: Sequence[CandidateSet], judge: str | Scorer, stop: Sequence[str] = (), seed: int = 0
) -> EvalResult:
    """Average reward with a 95 % bootstrap interval over prompts, and the spread among a prompt's candidates.

    ``mean``, ``std`` and ``max`` are means over prompts of each prompt's mean, standard deviation (population form, 0
    for a single response) and maximum: the columns of RRHF's Table 6. Training candidates and test answers go through
    this same function, so that the two are measured alike.

    Args:
        sets: records; on held-out prompts usually with one response each.
        judge: the name of a judge whose scores are in the records, or a scorer to grade with.
        stop: strings that end an answer; a scorer sees the text before them only. Scores that are in the records
            already cannot be cut afterwards, so there a text that holds a stop string is an error.
        seed: seed of the bootstrap.

    Returns:
        ``n`` counts prompts with a score; ``unscored`` draws and ``unscored_prompts`` are in no average.

    Raises:
        InputError: no response has a score, or a scored text holds a stop string.
    """
    name = judge if isinstance(judge, str) else judge.name
    graded = check_uncut(sets, stop) if isinstance(judge, str) else graded_each(sets, judge, stop)
    rows, draws, unscored = Columns(), 0, 0
    for record in graded:
        scores, drawn_here = scored(record, name), len(drawn(record))
        draws, unscored = draws + len(scores), unscored + drawn_here - len(scores)
        rows.add(record.id, {"n": len(scores), "unscored": drawn_here - len(scores), **_spread(scores)})
    known = {key: rows.known(key) for key in ("mean", "std", "max")}
    if not (full := len(known["mean"])):
        raise InputError(f"no response has a score by judge {name!r}")
    means = mean_intervals(known, seed=seed)
    counts = {
        "candidates": draws / full,
        "unscored": float(unscored),
        "unscored_prompts": float(len(rows) - full),
    }
    metrics = {key: mean.value for key, mean in means.items()} | counts
    return EvalResult(metrics, full, {key: mean.interval for key, mean in means.items()}, rows)


def _spread(scores: list[float]) -> dict[str, float]:
    if not scores:
        return {}
    return {"mean": math.fsum(scores) / len(scores), "std": float(np.std(scores)), "max": max(scores)}


GRADED_AT_ONCE = 1024
"""Records that a scorer gets together: as many as most test sets have."""


def grade(sets: Sequence[CandidateSet], scorer: Scorer, stop: Sequence[str] = ()) -> list[CandidateSet]:
    """Copies of the records, texts cut at ``stop``, with the scorer's scores added under its name."""
    return list(graded_each(sets, scorer, stop))


def graded_each(sets: Iterable[CandidateSet], scorer: Scorer, stop: Sequence[str] = ()) -> Iterator[CandidateSet]:
    """:func:`grade`, a part of the records after the other."""
    stream = iter(sets)
    while part := list(islice(stream, GRADED_AT_ONCE)):
        cut = [
            replace(record, responses=[replace(r, text=cut_at_stop(r.text, tuple(stop))[0]) for r in record.responses])
            for record in part
        ]
        for record, scores in zip(cut, scorer.score(cut), strict=True):
            for response, score in zip(record.responses, scores, strict=True):
                response.scores = response.scores | {scorer.name: None if score is None else float(score)}
        yield from cut


def check_uncut(sets: Sequence[CandidateSet], stop: Sequence[str]) -> Sequence[CandidateSet]:
    """``sets`` as they are.

    Raises:
        InputError: a text holds a stop string, so its score is of more than the answer.
    """
    wrong = [record.id for record in sets if any(mark in r.text for r in record.responses for mark in stop)]
    if wrong:
        raise InputError(
            f"{len(wrong)} records (first: {wrong[0]!r}) were scored with text behind a stop string; "
            "score them again with the stop strings cut"
        )
    return sets


# --- best of n ---------------------------------------------------------------------------------------------------


def expected_best(scores: Sequence[float], n: int) -> float:
    """Unbiased estimate of the expected maximum of ``n`` draws from ``N >= n`` exchangeable ones.

    The mean over all subsets of size n: ``sum_i C(i - 1, n - 1) / C(N, n) * x_(i)`` with x in rising order.

    Raises:
        ValueError: ``n`` is not between 1 and N.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs at least {n} scores, got {total}")
    subsets = math.comb(total, n)
    # Divided before anything else: whole numbers divide exactly however large, and would not fit a float.
    return math.fsum(math.comb(i, n - 1) / subsets * score for i, score in enumerate(sorted(scores)))


def evaluate_best_of_n(sets: Sequence[CandidateSet], judge: str, ns: Sequence[int] = (), seed: int = 0) -> EvalResult:
    """Expected reward of the best of n candidates, for each n: metrics ``best_of_1``, ``best_of_2``, ...

    Args:
        sets: scored records.
        judge: whose scores.
        ns: sizes; empty takes the powers of two up to the shortest list, and the shortest list's length.
        seed: seed of the bootstrap over prompts.

    Raises:
        InputError: no record has scores, or a size is larger than the shortest list.
    """
    lists = {ident: scores for ident, record in by_id(sets).items() if (scores := scored(record, judge))}
    if not lists:
        raise InputError(f"no response has a score by judge {judge!r}")
    shortest = min(lists, key=lambda ident: len(lists[ident]))
    limit = len(lists[shortest])
    sizes = list(ns) or sorted({2**k for k in range(limit.bit_length()) if 2**k <= limit} | {limit})
    if max(sizes) > limit or min(sizes) < 1:
        raise InputError(f"best of {max(sizes)} cannot be estimated: record {shortest!r} has {limit} scored responses")
    rows = [{"id": key} | {f"best_of_{n}": expected_best(lists[key], n) for n in sizes} for key in lists]
    means = mean_intervals({f"best_of_{n}": [row[f"best_of_{n}"] for row in rows] for n in sizes}, seed=seed)
    metrics = {name: mean.value for name, mean in means.items()} | {"unscored_prompts": float(len(sets) - len(lists))}
    return EvalResult(metrics, len(rows), {name: mean.interval for name, mean in means.items()}, rows)
