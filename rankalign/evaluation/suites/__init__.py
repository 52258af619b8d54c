"""Evaluation suites of others from local files: their published formats in, their published figures out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.tables import Table, some
from rankalign.registry import Entry, Registry
from rankalign.storage.jsonl import read_rows


@dataclass(frozen=True)
class Asked:
    """What a suite is given.

    Attributes:
        files: judgements, scores or answers, as the suite has them.
        questions: its data set, where it is at hand: ids that the files lack, or have beyond it, are then named.
        answers: files of model answers (``arena-hard``).
        baseline: the system that others are set against.
        judge: whose scores, of records that several judges scored.
        scorer: scores records now (``rewardbench2``).
        seed: of the bootstrap.
    """

    files: Sequence[str]
    questions: str = ""
    answers: Sequence[str] = ()
    baseline: str = ""
    judge: str = ""
    scorer: Any = None
    seed: int = 0


USES = {
    "rewardbench2": {"questions", "judge", "scorer"},
    "judgebench": {"questions"},
    "arena-hard": {"questions", "answers", "baseline"},
    "alpaca-eval": {"baseline"},
    "mt-bench": {"questions"},
    "ifeval": {"questions"},
}
"""What each suite makes something of, beside its files and the seed."""


@dataclass
class SuiteResult:
    """What a suite found.

    Attributes:
        metrics: value by name.
        n: prompts (or pairs) that the metrics rest on.
        ci95: 95 % intervals, resampled over prompts.
        tables: as people read them.
        remarks: what is missing, stands twice, or is not as the published figures have it.
    """

    metrics: dict[str, float]
    n: int
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


Suite = Callable[[Asked], SuiteResult]

SUITES = Registry(
    "suite",
    {
        name: Entry(f"rankalign.evaluation.suites.{module}:evaluate", summary)
        for name, module, summary in (
            ("rewardbench2", "reward_bench_2", "reward models: best of 4 by subset, and ties"),
            ("judgebench", "judge_bench", "judges on pairs with a right answer, both orders"),
            ("arena-hard", "arena_hard", "win rates against a baseline, style controlled"),
            ("alpaca-eval", "alpaca_eval", "win rates against a reference, length controlled"),
            ("mt-bench", "mt_bench", "two turns, graded or in pairs"),
            ("ifeval", "if_eval", "instructions that a function can check, strict and loose"),
        )
    },
)


def evaluate_suite(name: str, asked: Asked) -> SuiteResult:
    """Run a suite.

    Raises:
        InputError: no such suite, no files, or something it makes nothing of.
    """
    suite: Suite = SUITES.load(name)
    if not asked.files:
        raise InputError(f"suite {name!r} needs --files")
    for option in ("questions", "answers", "baseline", "judge", "scorer"):
        if getattr(asked, option) and option not in USES[name]:
            raise InputError(f"suite {name!r} makes nothing of {option}; leave it out")
    return suite(asked)


def rows_of(files: Iterable[str]) -> Iterator[tuple[Checker, dict[str, Any]]]:
    """The rows of JSON Lines or JSON lists, each with what names its place."""
    for file in files:
        for line, row in read_rows(file):
            yield Checker(file, line), row


def once(seen: dict[Any, Any], key: Any, row: Any, check: Checker, path: str) -> bool:
    """Whether a row is new: one that stands there again in the same words is dropped.

    Raises:
        RecordError: it says something else than its first.
    """
    if key not in seen:
        seen[key] = row
        return True
    if seen[key] != row:
        raise RecordError(check.file, check.line, path, f"{key!r} stands twice and differs; keep one")
    return False


def coverage(found: Iterable[Any], wanted: Iterable[Any], what: str = "") -> list[str]:
    """Sentences about ids that are missing or unknown.

    Args:
        found: ids of the files.
        wanted: ids of the data set.
        what: whose, for the message.
    """
    have, known = dict.fromkeys(map(str, found)), dict.fromkeys(map(str, wanted))
    missing, unknown = [i for i in known if i not in have], [i for i in have if i not in known]
    said = f"{what}: " if what else ""
    remarks = [f"{said}{len(missing)} of {len(known)} prompts are missing: {some(missing)}"] if missing else []
    return remarks + ([f"{said}{len(unknown)} prompts are not in the questions: {some(unknown)}"] if unknown else [])


def doubles(count: int) -> list[str]:
    """A sentence about rows that stood twice."""
    return [f"{count} rows stand twice and were dropped"] if count else []
