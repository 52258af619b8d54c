"""Scores and verdicts: which judge ranks, which pairs and which best answer follow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Response, refuse_weights
from rankalign.errors import InputError
from rankalign.storage.jsonl import kind

# Where records carry several judges and none is named, the first of these that is there ranks.
DEFAULT_JUDGES = (PREFERENCE, "score", "overall_score", "helpfulness")


def label_column(response: Response, column: str = "label") -> dict[str, bool]:
    """The column that says whether an answer is wanted, where a judge ``label`` said so."""
    label = response.scores.get("label")
    return {column: bool(label)} if label in (0, 1) else {}


def wanted(check: Checker, value: Any, column: str) -> float:
    """1 for an answer that people wanted, 0 for one that they did not, from a boolean or a number.

    Raises:
        RecordError: it is neither.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    shown = f"{value:g}" if isinstance(value, int | float) else kind(value)
    raise check.fail(column, f"expected true or false, or 1 or 0, found {shown}")


def paired(chosen: Response, rejected: Response) -> list[Response]:
    """Two answers of a data set as responses of policies ``chosen`` and ``rejected``, scored 1 and 0."""
    for response, policy, score in ((chosen, "chosen", 1.0), (rejected, "rejected", 0.0)):
        response.policy, response.scores = policy, {PREFERENCE: score, **response.scores}
    return [chosen, rejected]


def pick_judge(record: CandidateSet, wanted: str = "") -> str | None:
    """The judge whose scores rank this record, or None where it has no scores.

    Raises:
        InputError: several judges scored it, none is asked for and none is a default.
    """
    if wanted and ":" not in wanted:
        return wanted
    names = list(dict.fromkeys(name for r in record.responses for name, score in r.scores.items() if score is not None))
    if wanted:
        if wanted not in names:  # a judge may have a colon in its name
            refuse_weights(wanted, names)
        return wanted
    if len(names) < 2:
        return names[0] if names else None
    for name in DEFAULT_JUDGES:
        if name in names:
            return name
    raise InputError(f"record {record.id!r} has scores of several judges ({', '.join(names)}): name one with --judge")


def strict_pairs(scores: Sequence[float | None], losses: Losses, mode: str = "all") -> list[tuple[int, int]]:
    """Pairs ``(i, j)`` with ``scores[i] > scores[j]``, best first: C(K, 2) less the ties, or best and worst alone.

    Counted in ``losses``: ``ties`` (pairs of equal scores), ``responses without a score``, and
    ``prompts without a strict pair``.

    Raises:
        InputError: ``mode`` is neither ``all`` nor ``best-worst``.
    """
    known = {index: score for index, score in enumerate(scores) if score is not None}
    if missing := len(scores) - len(known):
        losses.add("responses without a score", missing)
    order = sorted(known, key=lambda index: -known[index])
    every = list(combinations(order, 2))
    found = [(i, j) for i, j in every if known[i] > known[j]]
    if ties := len(every) - len(found):
        losses.add("ties", ties)
    if not found:
        losses.add("prompts without a strict pair")
    if mode == "all":
        return found
    if mode != "best-worst":
        raise InputError(f"pairs must be 'all' or 'best-worst', got {mode!r}")
    if len(found) > 1:
        losses.add("pairs other than best and worst", len(found) - 1)
    return [(order[0], order[-1])] if found else []


def scored_responses(
    record: CandidateSet, wanted: str, losses: Losses, at_least: int = 2
) -> tuple[str, list[Response]]:
    """The ranking judge and the responses that have its score, none where they are fewer than ``at_least``."""
    judge = pick_judge(record, wanted) or ""
    scored = [response for response in record.responses if response.scores.get(judge) is not None]
    if missing := len(record.responses) - len(scored):
        losses.add("responses without a score", missing)
    if len(scored) >= at_least:
        return judge, scored
    losses.add("prompts with fewer than two scored responses" if at_least == 2 else "prompts without a scored response")
    return judge, []


def best(record: CandidateSet, judge: str | None, losses: Losses) -> Response | None:
    """The response to write where a row holds one: highest score, the first of equals; others are counted as lost."""
    if not record.responses:
        losses.add("prompts without a response")
        return None
    if len(record.responses) > 1:
        losses.add("responses other than the best", len(record.responses) - 1)
    scores = record.scores(judge) if judge else []
    top = max((score for score in scores if score is not None), default=None)
    return record.responses[0 if top is None else scores.index(top)]
