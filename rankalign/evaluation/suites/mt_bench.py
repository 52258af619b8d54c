"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): two turns, by FastChat's files of judgements, graded or in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError
from rankalign.evaluation.statistics import ratio_interval
from rankalign.evaluation.suites import Asked, SuiteResult, coverage, doubles, once, rows_of
from rankalign.evaluation.tables import Table, interval

LOWEST, HIGHEST, UNREAD = 1, 10, -1
WINNERS = ("model_1", "model_2", "tie", "error")


@dataclass(frozen=True)
class Graded:
    """One answer's grade in one turn; None where the judge could not be read."""

    question: str
    model: str
    turn: int
    score: float | None


@dataclass(frozen=True)
class Paired:
    """One turn of one pair: points of the first system by both orders, None where an order could not be read."""

    question: str
    models: tuple[str, str]
    turn: int
    points: float | None


def _graded(check: Checker, row: dict[str, Any]) -> Graded:
    score = float(check.number(check.need(row, "score"), "score"))
    if score != UNREAD and not LOWEST <= score <= HIGHEST:
        raise check.fail("score", f"expected {LOWEST} to {HIGHEST}, or -1 where nothing was read, found {score:g}")
    model = check.text(check.need(row, "model"), "model", empty=False)
    return Graded(str(check.need(row, "question_id")), model, _turn(check, row), None if score == UNREAD else score)


def _turn(check: Checker, row: dict[str, Any]) -> int:
    turn = row.get("turn", 1)
    if turn not in (1, 2):
        raise check.fail("turn", f"expected 1 or 2, found {turn!r}")
    return int(turn)


def _paired(check: Checker, row: dict[str, Any]) -> Paired:
    """FastChat's rule: an order that disagrees with the other makes a tie."""
    winners = [check.need(row, name) for name in ("g1_winner", "g2_winner")]
    for number, winner in enumerate(winners, start=1):
        if winner not in WINNERS:
            raise check.fail(f"g{number}_winner", f"expected one of {', '.join(WINNERS)}, found {winner!r}")
    models = check.text(check.need(row, "model_1"), "model_1"), check.text(check.need(row, "model_2"), "model_2")
    if "error" in winners:
        points = None
    else:
        points = {"model_1": 1.0, "model_2": 0.0}.get(winners[0], 0.5) if winners[0] == winners[1] else 0.5
    return Paired(str(check.need(row, "question_id")), models, _turn(check, row), points)


def evaluate(asked: Asked) -> SuiteResult:
    """Means by model and turn, or wins, ties and losses by model; by category where the questions are at hand."""
    graded: dict[Any, Graded] = {}
    paired: dict[Any, Paired] = {}
    twice = 0
    for check, row in rows_of(asked.files):
        judge = str(row.get("judge", ""))
        if "g1_winner" in row:
            pair = _paired(check, row)
            twice += not once(paired, (judge, pair.question, pair.models, pair.turn), pair, check, "question_id")
        else:
            one = _graded(check, row)
            twice += not once(graded, (judge, one.question, one.model, one.turn), one, check, "question_id")
    if not graded and not paired:
        raise InputError(f"{', '.join(asked.files)}: holds no judgements")
    categories = {
        str(row.get("question_id")): str(row.get("category", "")) for _, row in rows_of(filter(None, [asked.questions]))
    }
    found: list[Graded | Paired] = [*graded.values(), *paired.values()]
    result = SuiteResult({}, len({each.question for each in found}), remarks=doubles(twice))
    result.remarks += _gaps(found, categories)
    if graded:
        _add_grades(result, list(graded.values()), categories, asked.seed)
    if paired:
        _add_pairs(result, list(paired.values()), asked.seed)
    return result


def _gaps(found: Sequence[Graded | Paired], categories: dict[str, str]) -> list[str]:
    """Questions that a model and turn lack, or have beyond the questions."""
    wanted = list(categories) or list(dict.fromkeys(each.question for each in found))
    groups: dict[tuple[str, int], list[str]] = {}
    for each in found:
        name = each.model if isinstance(each, Graded) else " - ".join(each.models)
        groups.setdefault((name, each.turn), []).append(each.question)
    return [said for (name, turn), own in groups.items() for said in coverage(own, wanted, f"{name}, turn {turn}")]


def _add_grades(result: SuiteResult, rows: Sequence[Graded], categories: dict[str, str], seed: int) -> None:
    """The published columns: first turn, second turn, and the mean over all grades of both."""
    table, by_category = list[list[Any]](), list[list[Any]]()
    models = list(dict.fromkeys(row.model for row in rows))
    for model in models:
        own = [row for row in rows if row.model == model]
        unread = sum(row.score is None for row in own)
        known = [(row.question, row.turn, row.score) for row in own if row.score is not None]
        if not known:
            raise InputError(f"no grade of {model!r} could be read")
        turns = [_mean(score for _, turn, score in known if turn == number) for number in (1, 2)]
        questions: dict[str, list[float]] = {}
        for question, _, score in known:
            questions.setdefault(question, []).append(score)
        sums, counts = [math.fsum(q) for q in questions.values()], [float(len(q)) for q in questions.values()]
        mean = ratio_interval(sums, counts, seed=seed)
        result.metrics[f"score {model}"], result.ci95[f"score {model}"] = mean.value, mean.interval
        result.metrics |= {f"turn {n} {model}": v for n, v in enumerate(turns, start=1) if v is not None}
        table.append([model, *turns, mean.value, interval(mean.interval), len(questions), unread])
        for category in dict.fromkeys(filter(None, categories.values())):
            value = _mean(score for question, _, score in known if categories.get(question) == category)
            by_category.append([model, category, value])
    table.sort(key=lambda row: -row[3])
    note = "means of grades from 1 to 10; what could not be read is left out and counted; intervals resample questions"
    columns = ["model", "turn 1", "turn 2", "mean", "95 % interval", "questions", "unread"]
    result.tables.append(Table("MT-Bench", columns, table, note))
    if by_category:
        result.tables.append(Table("MT-Bench by category", ["model", "category", "mean"], by_category))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def _add_pairs(result: SuiteResult, rows: Sequence[Paired], seed: int) -> None:
    """Wins, ties and losses of each model over all its pairs, and the rate in which a tie is half a win."""
    table = list[list[Any]]()
    for model in dict.fromkeys(name for row in rows for name in row.models):
        questions: dict[str, list[float]] = {}
        unread = 0
        for row in rows:
            if model in row.models and row.points is not None:
                own = row.points if row.models[0] == model else 1 - row.points
                questions.setdefault(row.question, []).append(own)
            unread += model in row.models and row.points is None
        points = [value for own in questions.values() for value in own]
        if not points:
            raise InputError(f"no pair of {model!r} could be read in both orders")
        win, tie = points.count(1.0), points.count(0.5)
        estimate = ratio_interval([sum(q) for q in questions.values()], [len(q) for q in questions.values()], seed=seed)
        result.metrics[f"win_rate_adjusted {model}"] = estimate.value
        result.ci95[f"win_rate_adjusted {model}"] = estimate.interval
        loss = points.count(0.0)
        result.metrics |= {
            f"win_rate {model}": win / len(points),
            f"loss_rate {model}": loss / len(points),
        }
        table.append([model, win, tie, loss, estimate.value, interval(estimate.interval), unread])
    table.sort(key=lambda row: -row[4])
    columns = ["model", "win", "tie", "loss", "win rate", "95 % interval", "unread"]
    note = "both turns; orders that disagree are a tie, which is half a win; intervals resample questions"
    result.tables.append(Table("MT-Bench in pairs", columns, table, note))
