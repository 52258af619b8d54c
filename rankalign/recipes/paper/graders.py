"""Scorers that nothing is trained on, over the held-out answers of all rows: does more reward mean better answers?

They grade what finished units hold, so that one can be added to a table that ran long ago.
"""

from __future__ import annotations

from rankalign.config import ScoreConfig
from rankalign.errors import InputError
from rankalign.evaluation.raters.reward import evaluate_reward
from rankalign.recipes.paper.unit import ANSWERS, Unit
from rankalign.stages.generation import score

PREFIX = "by "
"""Stands before a grader's name among the measures, which have names of their own."""


def graded(unit: Unit) -> dict[str, list[float]]:
    """By grader, the mean score of each held-out prompt of a finished unit; what was graded before is read.

    Raises:
        InputError: another scorer graded under that name, a scorer failed, or it left an answer without a score.
    """
    found: dict[str, list[float]] = {}
    for grader in unit.bench.config.graders:
        name = f"graded.{grader.name}.jsonl"
        answers = unit.answering.folder
        score(ScoreConfig(str(answers / ANSWERS), str(answers / name), [grader]))
        rows = evaluate_reward(unit.held_out(name), grader.name).rows
        if bare := sum(row["unscored"] > 0 for row in rows):
            said = f"grader {grader.name!r} left answers to {bare} of {len(rows)} prompts without a score"
            raise InputError(f"{answers / name}: {said}")
        found[PREFIX + grader.name] = [row["mean"] for row in rows]
    return found
