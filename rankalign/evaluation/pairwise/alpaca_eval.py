"""AlpacaEval's numbers from its annotations: win rate as published, and at equal length, without a download."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankalign.data.records import Checker
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.statistics import Array, Estimate, Interval, mean_interval, percentile_interval
from rankalign.evaluation.tables import Table, interval
from rankalign.storage.jsonl import OnError, read_rows

DRAWN = (0.0, 1.5)
LENGTH_PENALTY = 0.01
FEWEST_MODELS = 3
REFITS = 1_000
_STEPS = 50
_TURNS = 200
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
    hand, ``length_controlled_winrate`` stands beside (see :func:`length_controlled`), with difficulties of the prompts
    where there are at least :data:`FEWEST_MODELS` models; ``difficulty_term`` says whether.

    Raises:
        InputError: a model has no parsed judgement.
    """
    by_model: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        by_model.setdefault(annotation.model, []).append(annotation)
    if not by_model:
        raise InputError("there are no annotations")
    difficulty = difficulties(annotation for own in by_model.values() for annotation in own)
    rows = [_row(model, own, difficulty, seed) for model, own in by_model.items()]
    return Leaderboard(sorted(rows, key=lambda row: -row["win_rate"]))


def _row(model: str, own: Sequence[Annotation], difficulty: dict[str, float], seed: int) -> dict[str, Any]:
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
        known = np.array([difficulty[a.prompt] for a, _ in parsed]) if difficulty else None
        controlled = length_controlled(wins, own_length - reference, seed=seed, difficulty=known)
        row |= {
            "avg_length": int(own_length.mean()),
            "length_controlled_winrate": 100 * controlled.value,
            "lc_ci95": [100 * bound for bound in controlled.interval],
            "difficulty_term": known is not None,
        }
    return row


# --- equal length ------------------------------------------------------------------------------------------------


def length_controlled(
    wins: Array, longer: Array, draws: int = REFITS, seed: int = 0, difficulty: Array | None = None
) -> Estimate:
    """The win rate that answers of equal length would have, after Dubois et al. 2024.

    Fitted is ``logit P(win) = a + b * tanh(longer / sd(longer)) + c * difficulty`` by maximum likelihood with soft
    targets and a Gaussian prior of variance 100 on b and c, which a judge of length alone would send to infinity; the
    estimate is the mean over prompts of ``sigmoid(a + c * difficulty)``. The published figures differ in that their
    difficulties come from all models of the leaderboard, and a and b are pulled to those of models whose answers were
    lengthened or shortened on purpose. The interval comes from refitting the model on resampled prompts.

    Args:
        wins: (P,) chances to win.
        longer: (P,) length of the answer less that of the reference's.
        draws: number of refits.
        seed: seed of the generator.
        difficulty: (P,) of each prompt, from :func:`difficulties`; None leaves the term out.
    """
    wins = np.asarray(wins, dtype=np.float64)
    columns = [np.ones(len(wins)), _length_term(longer), *([] if difficulty is None else [difficulty])]
    features = np.column_stack(columns)
    level = features * np.array([1.0, 0.0, 1.0])[: features.shape[1]]  # all answers as long as the reference's

    def rates(counts: Array) -> Array:
        chances = _chance(_fit(counts, wins, features) @ level.T)
        return np.asarray((counts * chances).sum(1) / counts.sum(1))

    counts = np.random.default_rng(seed).multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=draws)
    value = float(rates(np.ones((1, len(wins))))[0])
    return Estimate(value, _clip(percentile_interval(rates(counts.astype(np.float64)))))


def _length_term(longer: Array) -> Array:
    longer = np.asarray(longer, dtype=np.float64)
    spread = longer.std()
    return np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)


def _clip(bounds: Interval) -> Interval:
    return Interval(max(0.0, bounds.low), min(1.0, bounds.high))


def _chance(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits)))


def _fit(counts: Array, wins: Array, features: Array) -> Array:
    """(B, K) coefficients of B weighted fits at once by Newton's method.

    Args:
        counts: (B, P) weights.
        wins: (P,) soft targets.
        features: (P, K), the first of which is the intercept and has no prior.
    """
    size = features.shape[1]
    penalty = np.array([0.0, *[LENGTH_PENALTY] * (size - 1)])
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    found = np.zeros((len(counts), size))
    for _ in range(_STEPS):
        chance = _chance(found @ features.T)
        slope = (counts * (wins - chance)) @ features - penalty * found
        curve = ((counts * chance * (1 - chance)) @ products).reshape(-1, size, size)
        step = np.linalg.solve(curve + np.diag(penalty + 1e-9), slope[:, :, None])[:, :, 0]
        found = np.clip(found + np.clip(step, -2, 2), -_FARTHEST, _FARTHEST)
        if np.abs(step).max() < 1e-10:
            break
    return found


def difficulties(annotations: Iterable[Annotation]) -> dict[str, float]:
    """How much better than elsewhere models do on each prompt, in logits, with mean 0 (Dubois et al. 2024, step 1).

    Fitted to all models together is ``logit P(win) = a_m + b_m * tanh(longer / sd_m(longer)) + difficulty_x``, with a
    Gaussian prior of variance 1 on the difficulties, by turns: the models given the prompts, the prompts given the
    models.

    Returns:
        By prompt; empty where fewer than :data:`FEWEST_MODELS` models have parsed judgements with texts.
    """
    models: dict[str, list[tuple[str, float, float]]] = {}
    for a in annotations:
        if a.win is not None and a.lengths is not None:
            models.setdefault(a.model, []).append((a.prompt, a.win, a.lengths[1] - a.lengths[0]))
    if len(models) < FEWEST_MODELS:
        return {}
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(row[0] for own in models.values() for row in own))}
    tables = [_table_of(own, index) for own in models.values()]
    values = np.zeros(len(index))
    for _ in range(_TURNS):
        before = values
        slope, curve = -values, np.ones(len(values))
        for at, wins, features in tables:
            chance = _chance(_offset_fit(wins, features, values[at]) + values[at])
            np.add.at(slope, at, wins - chance)
            np.add.at(curve, at, chance * (1 - chance))
        values = values + np.clip(slope / curve, -2, 2)
        if np.abs(values - before).max() < 1e-9:
            break
    return {prompt: float(values[k] - values.mean()) for prompt, k in index.items()}


def _table_of(rows: list[tuple[str, float, float]], index: dict[str, int]) -> tuple[NDArray[np.int64], Array, Array]:
    """Prompts by number, chances to win, and (P, 2) features of one model."""
    wins, longer = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    features = np.column_stack([np.ones(len(rows)), _length_term(longer)])
    return np.array([index[row[0]] for row in rows]), wins, features


def _offset_fit(wins: Array, features: Array, offset: Array) -> Array:
    """(P,) logits of the best ``features @ x`` beside a fixed offset."""
    found, penalty = np.zeros(features.shape[1]), np.array([0.0, LENGTH_PENALTY])
    for _ in range(_STEPS):
        chance = _chance(features @ found + offset)
        slope = (wins - chance) @ features - penalty * found
        curve = (features * (chance * (1 - chance))[:, None]).T @ features + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curve, slope)
        found = np.clip(found + np.clip(step, -2, 2), -_FARTHEST, _FARTHEST)
        if np.abs(step).max() < 1e-10:
            break
    return np.asarray(features @ found)
