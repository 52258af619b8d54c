"""What came out of a run in plain words: the first thing on its page, for readers without depth in the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankalign.evaluation.pairwise.scores import System, compare_by_score
from rankalign.evaluation.report.curves import number, points
from rankalign.evaluation.report.hack import REPETITION, Flag
from rankalign.evaluation.report.runs import Run

# What a flag says of the trained model, to stand after "it also".
HABITS = {
    "length": "writes longer answers",
    "repetition": "repeats itself more",
    "list-density": "uses more lists and headings",
    "prompt-copying": "copies more from the prompt",
    "refusal": "refuses more often",
    "mode-collapse": "varies its answers less",
    "stock-phrase": "says the same phrase to most prompts",
    "reward-follows-length": "scores higher mainly where it writes more",
}
MEANING = {
    "good": "The interval lies above zero: chance alone hardly gives such a rise.",
    "bad": "The interval lies below zero: chance alone hardly gives such a fall.",
    "unclear": "The interval includes zero: these prompts do not show that the reward changed either way.",
}
DOUBT = "Something else changed with it, so read some answers before you believe the reward."
# Held-out measurements by which a checkpoint is called the best where the settings name none, the surest first.
TOLD = ("eval_win_rate", "eval_ranking_accuracy", "ranking_accuracy", "reward", "eval_loss", "loss")
"""What of a log is told in words, the most telling first."""
JUDGED_BY = ("eval_win_rate", "eval_ranking_accuracy", "eval_reward_accuracy", "eval_reward", "eval_loss")


@dataclass
class Headline:
    """What came out, in one number and a few sentences.

    Attributes:
        value: held-out reward after minus before.
        bounds: its 95 % interval.
        n: held-out prompts.
        tone: ``good`` (rose), ``bad`` (fell), ``unclear`` (the interval includes zero) or ``doubt`` (rose, with flags).
        lead: the outcome in one sentence.
        verdict: what the interval means, and whether to doubt it.
        win_rate: share of prompts that scored higher after training, ties half; None where texts are not at hand.
        win_bounds: its 95 % interval.
    """

    value: float
    bounds: tuple[float, float]
    n: int
    tone: str
    lead: str
    verdict: str
    win_rate: float | None = None
    win_bounds: tuple[float, float] | None = None


def headline(run: Run, flags: Sequence[Flag]) -> Headline | None:
    """The difference in held-out reward and what it means; None where the run has no such result."""
    system = _compared(run)
    if "difference" in run.result and "ci95" in run.result:
        value, bounds, n = run.result["difference"], run.result["ci95"], run.result.get("n_prompts", len(run.after))
    elif system is not None:
        value, bounds, n = system.difference, system.ci95, system.n
    else:
        return None
    low, high = map(float, bounds)
    tone = "good" if low > 0 else "bad" if high < 0 else "unclear"
    habits = [HABITS[flag.name] for flag in flags]
    sentences = [MEANING[tone]]
    if not flags and (rise := _repetition(run.result)):
        habits, sentences = [HABITS["repetition"]], [*sentences, rise]
    if habits and tone == "good":
        tone = "doubt"
        sentences.append(DOUBT)
    lead = _outcome(system, tone)
    lead += ", which may be chance" if tone == "unclear" and system is not None and system.win + system.loss else ""
    lead += f"; it also {_listed(habits)}." if habits else "."
    found = Headline(float(value), (low, high), int(n), tone, lead, " ".join(sentences))
    if system is not None:
        found.win_rate, found.win_bounds = system.win_rate, win_bounds(system)
    return found


def training_alone(run: Run) -> str:
    """What happened in a run without held-out answers, whose page cannot say whether they got better.

    Empty where the run has no log either.
    """
    steps = max((number(row, "step") or 0.0 for row in run.log), default=0.0)
    if not steps:
        return ""
    said = f"Training took {steps:.0f} step{'s' * (steps != 1)}"
    for name in TOLD:
        if len(own := points(run.log, name)) > 1:
            said += f"; {name.removeprefix('eval_').replace('_', ' ')}"
            said += " on held-out data" if name.startswith("eval_") else ""
            said += f" went from {own[0][1]:.3g} to {own[-1][1]:.3g}"
            break
    return f"{said}. It has no held-out answers from before and after, so nothing here says whether those got better."


def win_bounds(system: System) -> tuple[float, float]:
    """The 95 % interval of a win rate.

    Without ties the rate is a share of wins, whose exact interval holds where all prompts went one way, too.
    """
    exact = system.exact_ci95 if not system.tie else None
    return exact or system.win_rate_ci95


def _compared(run: Run) -> System | None:
    if not (run.before and run.after and run.judge):
        return None
    (system,) = compare_by_score(run.after, run.before, run.judge).systems
    return system


def _outcome(system: System | None, tone: str) -> str:
    """How many prompts went up, down and nowhere; the larger of the first two first."""
    if system is None:
        word = {"unclear": "did not clearly change", "bad": "got worse"}.get(tone, "got better")
        return f"The model {word} on held-out prompts"
    counts = [("better", system.win), ("worse", system.loss)]
    if system.loss > system.win:
        counts.reverse()
    (first, most), (second, rest) = counts
    if not most:
        said = f"The model scored the same on all {system.n} held-out prompts"
    else:
        said = f"The model got {first} on {'all' if most == system.n else f'{most} of'} {system.n} held-out prompts"
        said += f" and {second} on {rest}" if rest else ""
        said += f", with the same score on {system.tie}" if system.tie else ""
    return said + (f" ({system.unparsed} without a score are left out)" if system.unparsed else "")


def _listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _repetition(result: Mapping[str, Any]) -> str:
    """A rise of repetition, for runs whose texts are not at hand to test it."""
    before, after = result.get("repetition_before"), result.get("repetition_after")
    if before is None or after is None or after - before < REPETITION:
        return ""
    return f"The share of repeated 3-grams rose from {before:.1%} to {after:.1%}."


@dataclass(frozen=True)
class Best:
    """The best held-out measurement of a training run.

    Attributes:
        metric: by which; without ``eval_``.
        step: of the measurement.
        value: measured there; of equal ones the first counts.
        last_step: of the last measurement.
        last_value: measured there.
        measured: how many measurements there were.
        place: path of the checkpoint of that step in the run's folder; empty where it was not kept.
        loaded: the run ended by going back to it.
    """

    metric: str
    step: int
    value: float
    last_step: int
    last_value: float
    measured: int
    place: str = ""
    loaded: bool = False

    def sentence(self) -> str:
        """For people."""
        name = self.metric.replace("_", " ")
        said = f"The best checkpoint is that of step {self.step}: held-out {name} {self.value:.4g}"
        if self.step != self.last_step:
            said += f", {self.last_value:.4g} at the last measurement (step {self.last_step})"
        if self.loaded:
            return f"{said}. The run went back to it at its end."
        if self.step == self.last_step:
            return f"{said}, which is the last measurement."
        return f"{said}. {f'It lies in {self.place}.' if self.place else 'It was not kept.'}"


def best_checkpoint(
    log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], places: Mapping[int, str]
) -> Best | None:
    """The step whose model did best on held-out data while training; None with fewer than two measurements.

    Args:
        log: lines of ``log.jsonl``.
        settings: of the training run; ``metric_for_best_model`` and ``greater_is_better`` are followed.
        places: path of each checkpoint that is kept, by its step.
    """
    wanted = str(settings.get("metric_for_best_model") or "")
    names = [f"eval_{wanted.removeprefix('eval_')}"] if wanted else list(JUDGED_BY)
    for name in names:
        rows = [(int(step), value) for step, value in points(log, name)]
        if len({step for step, _ in rows}) > 1:
            greater = settings.get("greater_is_better")
            sign = 1 if (not name.endswith("loss") if greater is None else greater) else -1
            step, value = max(rows, key=lambda row: sign * row[1])
            loaded = bool(settings.get("load_best_model_at_end"))
            return Best(name[5:], step, value, *rows[-1], len(rows), places.get(step, ""), loaded)
    return None
