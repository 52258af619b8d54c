"""What the best run of a sweep is best by: a figure of the log, with its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.registry import did_you_mean
from rankalign.storage.jsonl import read_rows
from rankalign.training.arguments import ROUGE, TrainConfig
from rankalign.training.measures import WATCHED, measured_names

# What rises as a model gets better, in `log.jsonl` and without `eval_`; losses, their parts, repetition and kl fall.
HIGHER = frozenset({
    "ranking_accuracy", "accuracy_low", "accuracy_high", "margin", "reward_accuracy", "best_logp", "win_rate",
    "win_rate_low", "win_rate_high", "mean_reward", "reward", "rouge1", "rouge2", "rougeL",
})  # fmt: skip
PPO_FIGURES = ("reward", "kl", "policy_loss", "value_loss")


@dataclass(frozen=True)
class Metric:
    """What the best run is best by.

    Attributes:
        name: as in ``log.jsonl``; empty where there is none.
        highest: whether more is better.
    """

    name: str = ""
    highest: bool = True

    @property
    def said(self) -> str:
        """The metric with its direction, in words."""
        return f"{self.name} ({'higher' if self.highest else 'lower'} is better)"


def metric_of(asked: str, configs: Sequence[TrainConfig]) -> Metric:
    """The metric of ``--metric NAME[:max|:min]``, or, where none is named, of measurements while training.

    Raises:
        InputError: one that these runs do not give, or whose direction nobody knows.
    """
    measured = all(config.eval_strategy != "no" for config in configs)
    if not asked:
        best = {str(config.metric_for_best_model) for config in configs if config.load_best_model_at_end}
        asked = (best.pop() if len(best) == 1 else "ranking_accuracy") if measured else ""
    if not asked:
        return Metric()
    name, _, way = asked.partition(":")
    plain = name.removeprefix("eval_")
    if way not in ("", "max", "min"):
        raise InputError(f"--metric {asked}: the direction is max or min")
    if name.startswith("eval_") and not measured:
        raise InputError(f"--metric {name}: nothing is measured; give --eval_data or --eval_split, and --eval_strategy")
    known = set.intersection(*map(_logged, configs))
    if plain not in known:
        raise InputError(f"--metric {name}: these runs do not log it{did_you_mean(plain, known)}")
    full = f"eval_{plain}" if measured and plain != "train_loss" else plain
    return Metric(full, way == "max" if way else plain in HIGHER)  # the parts of a loss are losses, which fall


def _logged(config: TrainConfig) -> set[str]:
    """What the log of a run has, without ``eval_``."""
    if config.method == "ppo":
        return {*PPO_FIGURES}
    watched = {*WATCHED} if config.watch else set()
    return (
        {"train_loss", *measured_names(config.loss_settings)} | watched | ({*ROUGE} if config.best_by_rouge else set())
    )


def last_line(folder: Path, metric: Metric, keeps_best: str = "") -> dict[str, Any]:
    """The line of a run's log that has the metric of the weights that it left; empty where none has it.

    Args:
        folder: the run's.
        metric: which.
        keeps_best: ``NAME:max`` or ``NAME:min``, in the words of the log, where the checkpoint was kept that was best
            by it; empty where the last weights were.
    """
    lines = [row for _, row in read_rows(folder / "log.jsonl")]
    name, _, way = keeps_best.partition(":")
    if scored := [line for line in lines if name and isinstance(line.get(name), int | float)]:
        best = (max if way == "max" else min)(scored, key=lambda line: line[name])  # the first of equal ones
        lines = [line for line in lines if line.get("step") == best.get("step")]
    found = [line for line in lines if isinstance(line.get(metric.name), int | float)]
    return dict(found[-1]) if found else {}
