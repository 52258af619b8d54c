"""AlpacaEval 1 and 2: the leaderboard of annotations that exist, at equal length too."""

from __future__ import annotations

from rankalign.evaluation.pairwise.alpaca_eval import leaderboard, read_annotations
from rankalign.evaluation.suites import Asked, SuiteResult


def evaluate(asked: Asked) -> SuiteResult:
    """Win rates as shares; see :func:`rankalign.evaluation.pairwise.alpaca_eval.leaderboard`."""
    annotations = [each for file in asked.files for each in read_annotations(file)]
    board = leaderboard(annotations, asked.seed, asked.baseline)
    result = SuiteResult({}, max(row["n"] for row in board.rows), tables=[board.table()], remarks=board.remarks)
    several = len({(row["reference"], row["annotator"]) for row in board.rows}) > 1
    for row in board.rows:
        name = ", ".join([row["model"], row["reference"], row["annotator"]] if several else [row["model"]])
        for key, bounds in (("win_rate", "ci95"), ("length_controlled_winrate", "lc_ci95")):
            if key in row:
                result.metrics[f"{key} {name}"] = row[key] / 100
                result.ci95[f"{key} {name}"] = (row[bounds][0] / 100, row[bounds][1] / 100)
    return result
