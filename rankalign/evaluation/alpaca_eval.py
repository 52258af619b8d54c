"""AlpacaEval's numbers from its annotations: win rate as published, and at equal length, without a download."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankalign.errors import InputError, RecordError
from rankalign.evaluation.statistics import Array, Estimate, Interval, mean_interval, percentile_interval
from rankalign.evaluation.tables import Table, interval
from rankalign.records import Checker, OnError, read_rows

DRAWN = (0.0, 1.5)
LENGTH_PENALTY = 0.01
REFITS = 1_000
_STEPS = 50
_FARTHEST = 15.0  # logits beyond this are 0 or 1 to six digits


@dataclass(frozen=True)
class Annotation:
    """One judgement of a model's answer against the reference's.

    Attributes:
        model: whose answer.
        prompt: what identifies the prompt.
        win: chance that the model's answer is better, 0 to 1; None where the judge could not be parsed.
        lengths: characters of the reference's and of the model's answer; None where the texts are not at hand.
    """

    model: str
    prompt: str
    win: float | None
    lengths: tuple[int, int] | None = None


def win_of(preference: float | None) -> float | None:
    """AlpacaEval's ``preference`` as a chance: 1 is the reference, 2 the model, 0 and 1.5 draws, between them weights.

    Raises:
        ValueError: the number is none of these.
    """
    if preference is None:
        return None
    if preference in DRAWN:
        return 0.5
    if not 1 <= preference <= 2:
        raise ValueError(f"a preference is 0, null, or from 1 to 2, not {preference}")
    return preference - 1


def read_annotations(path: str | os.PathLike[str], on_error: OnError | None = None) -> list[Annotation]:
    """Annotations of a file: AlpacaEval's own ``annotations.json``, or the same rows with the texts left out.

    Args:
        path: the file.
        on_error: takes each bad row, which is then left out; without it the first one raises.

    Raises:
        RecordError: a row lacks ``preference`` or the model's name.
    """
    found = []
    for line, row in read_rows(path, on_error):
        try:
            found.append(_annotation(Checker(path, line), row))
        except RecordError as error:
            if on_error is None:
                raise
            on_error(error)
    return found


def _annotation(check: Checker, row: dict[str, Any]) -> Annotation:
    raw = check.need(row, "preference")
    try:
        win = win_of(None if raw is None else float(check.number(raw, "preference")))
    except ValueError as error:
        raise check.fail("preference", str(error)) from None
    model = check.text(row.get("model") or check.need(row, "generator_2"), "generator_2", empty=False)
    prompt = str(row["prompt_id"]) if "prompt_id" in row else check.text(check.need(row, "instruction"), "instruction")
    texts = [row.get(f"output_{k}") for k in (1, 2)]
    lengths = (len(str(texts[0])), len(str(texts[1]))) if None not in texts else None
    return Annotation(model, prompt, win, lengths)


@dataclass
class Leaderboard:
    """Rows by model, best first; the keys are those of AlpacaEval's leaderboard files where it has them."""

    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"leaderboard": self.rows}

    def table(self) -> Table:
        """The leaderboard for people."""
        columns = ["model", "win rate", "standard error", "95 % interval", "at equal length", "n", "unparsed"]
        rows = []
        for row in self.rows:
            known = [row["model"], row["win_rate"], row["standard_error"], interval(row["ci95"])]
            rows.append([*known, row.get("length_controlled_winrate"), row["n"], row["unparsed"]])
        return Table("Win rates in percent", columns, rows, "intervals bootstrapped over prompts")


def leaderboard(annotations: Iterable[Annotation], seed: int = 0) -> Leaderboard:
    """Win rates of all models in the annotations.

    ``win_rate`` is 100 times the mean chance to win, ``standard_error`` 100 times its sample standard deviation over
    sqrt(n), as published; ``n_wins``, ``n_wins_base``, ``n_draws`` and ``discrete_win_rate`` count a chance above,
    below and at one half. Judgements without a preference are not in ``n`` but in ``unparsed``. Where all texts are at
    hand, ``length_controlled_winrate`` stands beside (see :func:`length_controlled`).

    Raises:
        InputError: a model has no parsed judgement.
    """
    by_model: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        by_model.setdefault(annotation.model, []).append(annotation)
    if not by_model:
        raise InputError("there are no annotations")
    rows = [_row(model, own, seed) for model, own in by_model.items()]
    return Leaderboard(sorted(rows, key=lambda row: -row["win_rate"]))


def _row(model: str, own: Sequence[Annotation], seed: int) -> dict[str, Any]:
    parsed = [(a, a.win) for a in own if a.win is not None]
    if not parsed:
        raise InputError(f"no judgement of {model!r} has a preference")
    wins = np.array([win for _, win in parsed])
    n, better, worse = len(wins), int((wins > 0.5).sum()), int((wins < 0.5).sum())
    row: dict[str, Any] = {
        "model": model,
        "win_rate": 100 * math.fsum(wins) / n,
        "standard_error": 100 * float(wins.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        "ci95": [100 * bound for bound in mean_interval(wins, seed=seed).interval],
        "n": n, "unparsed": len(own) - n, "n_wins": better, "n_wins_base": worse, "n_draws": n - better - worse,
        "discrete_win_rate": 100 * (better + (n - better - worse) / 2) / n,
    }  # fmt: skip
    lengths = [a.lengths for a, _ in parsed]
    if all(lengths):
        reference, own_length = np.array(lengths, dtype=np.float64).T
        controlled = length_controlled(wins, own_length - reference, seed=seed)
        row |= {
            "avg_length": int(own_length.mean()),
            "length_controlled_winrate": 100 * controlled.value,
            "lc_ci95": [100 * bound for bound in controlled.interval],
        }
    return row


# --- equal length ------------------------------------------------------------------------------------------------


def length_controlled(wins: Array, longer: Array, draws: int = REFITS, seed: int = 0) -> Estimate:
    """The win rate that answers of equal length would have, after Dubois et al. 2024, from this model's rows alone.

    Fitted is ``logit P(win) = a + b * tanh(longer / sd(longer))`` by maximum likelihood with soft targets and a
    Gaussian prior of variance 100 on b, which a judge of length alone would send to infinity; the estimate is
    ``sigmoid(a)``. The published one also has a term for the difficulty of each instruction, estimated over all models
    of its leaderboard, which is not at hand offline; so the two agree in direction, not in digits. The interval comes
    from refitting the model on resampled prompts.

    Args:
        wins: (P,) chances to win.
        longer: (P,) length of the answer less that of the reference's.
        draws: number of refits.
        seed: seed of the generator.
    """
    wins, longer = np.asarray(wins, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    spread = longer.std()
    length = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)
    counts = np.random.default_rng(seed).multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=draws)
    value = _fit(np.ones((1, len(wins))), wins, length)[0]
    return Estimate(float(value), _clip(percentile_interval(_fit(counts.astype(np.float64), wins, length))))


def _clip(bounds: Interval) -> Interval:
    return Interval(max(0.0, bounds.low), min(1.0, bounds.high))


def _fit(counts: Array, wins: Array, length: Array) -> Array:
    """``sigmoid(a)`` of B weighted fits at once by Newton's method; counts are (B, P), the others (P,)."""
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * length)))
        slack, curve = counts * (wins - chance), counts * chance * (1 - chance)
        slope_a, slope_b = slack.sum(1), slack @ length - LENGTH_PENALTY * b
        aa, ab, bb = curve.sum(1) + 1e-9, curve @ length, curve @ length**2 + LENGTH_PENALTY
        scale = aa * bb - ab**2
        step_a, step_b = (bb * slope_a - ab * slope_b) / scale, (aa * slope_b - ab * slope_a) / scale
        a = np.clip(a + np.clip(step_a, -2, 2), -_FARTHEST, _FARTHEST)
        b = np.clip(b + np.clip(step_b, -2, 2), -_FARTHEST, _FARTHEST)
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-10:
            break
    return 1 / (1 + np.exp(-a))
