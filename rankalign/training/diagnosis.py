"""What goes wrong while training, in words and with advice: a function of the log lines so far.

Each warning compares the first :data:`WINDOW` log lines with the last, so that one bad batch says nothing, and is given
once a run. Since nothing but the log is looked at, a resumed run warns as one that was never interrupted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean, median, variance
from typing import Any, NamedTuple

from transformers import TrainerCallback

from rankalign.data.shares import clustered_wilson

WINDOW = 20
DISPLACEMENT = 0.1  # nats a token by which the best candidates fell
STILL = 0.01  # gradient norm, as a share of that at the start
SOLVED = 0.99  # ranking accuracy at which a vanished gradient means that all is learned
TIED = 0.5  # share of tied pairs
UPDATES = 100  # before which accuracy at chance is no news
NARROW = 0.6  # an interval of accuracy that reaches higher does not show chance
REPEATED = 0.1  # rise in the share of repeated 3-grams

Line = Mapping[str, Any]


class Advice(NamedTuple):
    """One warning: a name, and what is wrong and what to do in words."""

    name: str
    message: str


# --- rules -------------------------------------------------------------------------------------------------------


def diagnose(history: Sequence[Line]) -> list[Advice]:
    """All that is wrong by the log so far."""
    lines = [line for line in history if "loss" in line]
    held_out = [line for line in history if "eval_loss" in line]
    found = [_displacement(lines), _gradient(lines), _ties(lines), _chance(lines)]
    found += [_held_out(held_out), _repetition(held_out)]
    return [advice for advice in found if advice is not None]


def _ends(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]] | None:
    """The first and the last values of a quantity; None while they would overlap."""
    values = [float(line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return (values[:WINDOW], values[-WINDOW:]) if len(values) >= 2 * WINDOW else None


def _rise(lines: Sequence[Line], name: str) -> float:
    """Rise of the mean from the first to the last lines; 0 where it is within two standard errors, or not known."""
    if (ends := _ends(lines, name)) is None:
        return 0.0
    rise = fmean(ends[1]) - fmean(ends[0])
    return rise if abs(rise) > 2 * math.sqrt(sum(variance(end) for end in ends) / WINDOW) else 0.0


def _displacement(lines: Sequence[Line]) -> Advice | None:
    """Likelihood displacement (Razin et al. 2024): both sides of a pair grow unlikely, the worse one faster."""
    fall, margin = -_rise(lines, "best_logp"), _rise(lines, "margin")
    if fall < DISPLACEMENT or margin <= 0:
        return None
    return Advice(
        "likelihood-displacement",
        f"the best answers lost {fall:.2f} nats a token while the margin grew: probability goes to texts that nobody "
        "ranked. Give the SFT part more weight (or take a loss that has one), lower --learning_rate or raise --beta.",
    )


def _gradient(lines: Sequence[Line]) -> Advice | None:
    ends, accuracy = _ends(lines, "grad_norm"), _pooled(lines[-WINDOW:])
    if ends is None or not median(ends[1]) < STILL * median(ends[0]):
        return None
    share = f"the gradient is at {100 * median(ends[1]) / median(ends[0]):.2g} % of what it was at the start"
    if accuracy is not None and accuracy >= SOLVED:
        return Advice(
            "saturated",
            f"{share} and {accuracy:.1%} of the pairs are in order: nothing is left to learn here. Stop, or bring "
            "candidates that are harder to tell apart.",
        )
    return Advice(
        "vanishing-gradient",
        f"{share}, but not all pairs are in order: the loss is flat where the model stands. Lower --beta or the "
        "length of the run, or take a loss that does not saturate.",
    )


def _pooled(lines: Sequence[Line]) -> float | None:
    known = [(line["ranking_accuracy"] * line["pairs"], line["pairs"]) for line in lines if "ranking_accuracy" in line]
    pairs = sum(n for _, n in known)
    return sum(right for right, _ in known) / pairs if pairs else None


def _ties(lines: Sequence[Line]) -> Advice | None:
    if len(lines) < WINDOW:
        return None
    tied, pairs = (sum(line.get(name, 0) for line in lines[:WINDOW]) for name in ("tied_pairs", "pairs"))
    if tied + pairs == 0 or tied / (tied + pairs) <= TIED:
        return None
    return Advice(
        "ties",
        f"{tied / (tied + pairs):.0%} of the pairs have equal scores and teach nothing. Take a finer judge or the mean "
        "of several, or drop duplicate answers (`rankalign lint` counts them).",
    )


def _chance(lines: Sequence[Line]) -> Advice | None:
    known = [line for line in lines if "ranking_accuracy" in line]
    if len(known) < 2 * WINDOW or known[-1].get("step", 0) < UPDATES:
        return None
    last = known[-WINDOW:]
    bounds = clustered_wilson([n["ranking_accuracy"] * n["pairs"] for n in last], [n["pairs"] for n in last])
    return _at_chance("chance", "training", bounds, known[-1]["step"])


def _held_out(lines: Sequence[Line]) -> Advice | None:
    if not lines or lines[-1].get("step", 0) < UPDATES or "eval_accuracy_low" not in lines[-1]:
        return None
    bounds = lines[-1]["eval_accuracy_low"], lines[-1]["eval_accuracy_high"]
    return _at_chance("held-out-chance", "held-out", bounds, lines[-1]["step"])


_NO_BETTER = (
    "no more than by chance. Is the judge noise, the learning rate too small, or the answer cut off by --max_length?"
)


def _at_chance(name: str, which: str, bounds: tuple[float, float] | None, step: int) -> Advice | None:
    if bounds is None or bounds[0] > 0.5 or bounds[1] > NARROW:
        return None
    below = bounds[1] < 0.5
    return Advice(
        name,
        f"after {step} updates {bounds[0]:.1%} to {bounds[1]:.1%} of the {which} pairs are in order, "
        + ("less than by chance. Is a lower score better in these data?" if below else _NO_BETTER),
    )


def _repetition(lines: Sequence[Line]) -> Advice | None:
    known = [line["eval_repetition"] for line in lines if "eval_repetition" in line]
    if len(known) < 2 or known[-1] - known[0] < REPEATED:
        return None
    return Advice(
        "repetition",
        f"repeated 3-grams rose from {known[0]:.0%} to {known[-1]:.0%} of the model's own answers. Read some before "
        "going on; give the SFT part more weight, or score answers with a judge that punishes it.",
    )


# --- the callback ------------------------------------------------------------------------------------------------


class Diagnosis(TrainerCallback):
    """Adds ``warnings`` (words by name) to the log line at which each is first seen, and says it on stderr.

    It stands before whoever writes the log, for the line to be whole.
    """

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the log as it is now."""
        said = {name for line in state.log_history for name in line.get("warnings", ())}
        new = [advice for advice in diagnose(state.log_history) if advice.name not in said]
        if not new:
            return
        state.log_history[-1]["warnings"] = {advice.name: advice.message for advice in new}
        if state.is_world_process_zero:
            for advice in new:
                print(f"warning ({advice.name}): {advice.message}", file=sys.stderr, flush=True)
