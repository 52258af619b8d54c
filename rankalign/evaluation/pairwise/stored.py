"""Results from judgements that exist already: ``rankalign compare --reviews F``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rankalign.data.records import Checker
from rankalign.evaluation.pairwise.alpaca_eval import Leaderboard, leaderboard, read_annotations
from rankalign.evaluation.pairwise.orders import compare_reviews
from rankalign.evaluation.pairwise.reviews import read_answers, read_reviews
from rankalign.evaluation.pairwise.scores import Comparison
from rankalign.storage.jsonl import OnError, read_rows


def recompute(
    path: str | os.PathLike[str],
    parser: str = "",
    baseline: str = "",
    questions: str | os.PathLike[str] = "",
    on_error: OnError | None = None,
    seed: int = 0,
    answers: Sequence[str | os.PathLike[str]] = (),
) -> Comparison | Leaderboard:
    """Scores, win rates and intervals of a file of judgements; no judge is called.

    AlpacaEval annotations, told by their ``preference``, give a leaderboard; reviews of Vicuna, QLoRA and minChatGPT a
    comparison. Both have ``as_dict()`` for ``--json`` and ``table()`` for people.

    Args:
        path: the file.
        parser: see :func:`rankalign.evaluation.pairwise.orders.compare_reviews`.
        baseline: the system to name second; of annotations, the one reference to show.
        questions: file of ``question_id`` and ``category``, for sums by category; empty gives none.
        on_error: takes each bad row, which is then left out; without it the first one raises.
        seed: seed of the bootstrap.
        answers: FastChat's answer files, which say whose answers a review's answer ids are.

    Raises:
        InputError: nothing in the file can be compared.
        RecordError: a row is broken.
    """
    first = next((row for _, row in read_rows(path, lambda _: None)), {})  # broken rows are reported below
    if "preference" in first:
        return leaderboard(read_annotations(path, on_error), seed, baseline)
    categories = read_categories(questions) if questions else {}
    owners = read_answers(answers) if answers else None
    return compare_reviews(read_reviews(path, on_error, owners), parser, baseline, categories, seed)


def read_categories(path: str | os.PathLike[str]) -> dict[str, str]:
    """Category by question id of a file such as Vicuna's ``question.jsonl``."""
    found: dict[str, str] = {}
    for line, row in read_rows(path):
        check = Checker(path, line)
        question = str(check.need(row, "question_id"))
        if question in found:
            raise check.fail("question_id", f"{question!r} stands in the file twice")
        found[question] = check.text(check.need(row, "category"), "category")
    return found
