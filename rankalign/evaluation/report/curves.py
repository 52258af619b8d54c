"""Which figures of a training log are drawn together: in the report, over several runs, in a run that is watched."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Columns of the training log by panel; a panel without any is left out.
CURVES = {
    "Loss": ("loss", "rank_loss", "sft_loss", "eval_loss"),
    "Ranking accuracy": ("ranking_accuracy", "eval_ranking_accuracy", "reward_accuracy"),
    "Margin": ("margin", "eval_margin"),
    "Win rate while training": ("eval_win_rate",),
    "Reward while training": ("reward", "mean_reward"),
    "KL to the start model": ("kl", "approx_kl"),
    "Losses of policy and critic": ("policy_loss", "value_loss"),
    "Entropy": ("entropy",),
    "Tokens of an answer": ("response_tokens",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
SERIES = 4
"""Lines of one panel at most."""
BARE = ("Learning rate",)
"""Panels whose values are set, not measured: they are drawn without a running mean."""


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a log line; None where it has none of that name."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has both."""
    rows = ((number(row, "step"), number(row, name)) for row in log)
    return [(step, value) for step, value in rows if step is not None and value is not None]


def panels(names: Collection[str]) -> dict[str, list[str]]:
    """Of the columns of a log, those that are drawn, by panel."""
    found = {title: [name for name in known if name in names][:SERIES] for title, known in CURVES.items()}
    return {title: own for title, own in found.items() if own}
