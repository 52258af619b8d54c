"""Arena-Hard v2: win rates against a baseline by category, as they are and with style controlled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankalign.data.records import Checker
from rankalign.data.words import pieces
from rankalign.errors import InputError
from rankalign.evaluation.statistics import Array, percentile_interval
from rankalign.evaluation.suites import Asked, SuiteResult, coverage, doubles, once, rows_of
from rankalign.evaluation.suites.style import FEATURES, Fit, differences, fit, markdown_counts, normalised, style_of
from rankalign.evaluation.tables import Table, interval, some

BASELINES = {"hard_prompt": "o3-mini-2025-01-31", "coding": "o3-mini-2025-01-31", "math": "o3-mini-2025-01-31",
             "creative_writing": "gemini-2.0-flash-001"}  # fmt: skip
"""The published baseline of each category."""
WEIGHT = 3
"""How often a clear verdict (``>>``) counts."""
POINTS = {
    "A>>B": (1.0, WEIGHT), "A>B": (1.0, 1), "A=B": (0.5, 1), "B=A": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, WEIGHT),
    "B>A": (0.0, 1), "B>>A": (0.0, WEIGHT), "B<A": (1.0, 1), "B<<A": (1.0, WEIGHT),
}  # fmt: skip
"""What a verdict is worth to A, and how often it counts."""
REFITS = 200


@dataclass(frozen=True)
class Battle:
    """One game: the model's points against the baseline, and how often they count."""

    prompt: str
    category: str
    model: str
    baseline: str
    points: float
    weight: int


def _battles(check: Checker, row: dict[str, Any], baseline: str) -> tuple[list[Battle], bool]:
    """The two games of a row, and whether both could be read: a row that lacks one counts as none."""
    games = check.array(check.need(row, "games"), "games", at_least=2)
    category = str(row.get("category") or "hard_prompt")
    other = baseline or str(row.get("baseline") or BASELINES.get(category, ""))
    if not other:
        raise check.fail("category", f"{category!r} has no published baseline; name one with --baseline")
    told = [game.get("score") if isinstance(game, dict) else None for game in games[:2]]
    scores = [str(score) for score in told if score is not None]
    if len(scores) < 2:
        return [], False
    for number, score in enumerate(scores):
        if score not in POINTS:
            raise check.fail(f"games[{number}].score", f"expected one of {', '.join(POINTS)}, found {score!r}")
    model, prompt = check.text(check.need(row, "model"), "model", empty=False), str(check.need(row, "uid"))
    # In the first game the baseline is A.
    own = [(1 - POINTS[scores[0]][0], POINTS[scores[0]][1]), POINTS[scores[1]]]
    return [Battle(prompt, category, model, other, points, weight) for points, weight in own], True


def evaluate(asked: Asked) -> SuiteResult:
    """Win rates by category: the mean of all games, and with answers (``--answers``) the one at equal style."""
    seen: dict[tuple[str, str, str], Any] = {}
    battles, unread, twice = list[Battle](), dict[str, int](), 0
    for check, row in rows_of(asked.files):
        key = (str(row.get("judge", "")), str(row.get("model")), str(row.get("uid")))
        if not once(seen, key, {"games": row.get("games")}, check, "uid"):
            twice += 1
            continue
        own, read = _battles(check, row, asked.baseline)
        battles += own
        if not read:
            unread[key[1]] = unread.get(key[1], 0) + 1
    if not battles:
        raise InputError(f"{', '.join(asked.files)}: not one pair of games could be read")
    styles, remarks = _styles(asked.answers)
    remarks = (
        doubles(twice)
        + [f"{model}: {n} prompts have a game that could not be read" for model, n in unread.items()]
        + remarks
    )
    remarks += _gaps(battles, asked.questions)
    result = SuiteResult({}, len({battle.prompt for battle in battles}), remarks=remarks)
    for category in dict.fromkeys(battle.category for battle in battles):
        _category(result, category, [b for b in battles if b.category == category], styles, asked.seed)
    return result


def _gaps(battles: Sequence[Battle], questions: str) -> list[str]:
    """What each model lacks of the prompts, or has beyond them."""
    categories = dict.fromkeys(battle.category for battle in battles)
    known: dict[str, list[str]] = {category: [] for category in categories}
    for _, row in rows_of([questions] if questions else []):
        known.setdefault(str(row.get("category") or "hard_prompt"), []).append(str(row.get("uid")))
    remarks = []
    for category in categories:
        own = [battle for battle in battles if battle.category == category]
        wanted = known[category] if questions else [battle.prompt for battle in own]
        for model in dict.fromkeys(battle.model for battle in own):
            remarks += coverage((b.prompt for b in own if b.model == model), wanted, f"{model}, {category}")
    return remarks


def _styles(files: Sequence[str]) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    """Style of each answer by (model, prompt): the published metadata, else counted here."""
    found: dict[tuple[str, str], list[float]] = {}
    counted, twice = 0, 0
    for check, row in rows_of(files):
        key = (check.text(check.need(row, "model"), "model", empty=False), str(check.need(row, "uid")))
        metadata = row.get("metadata")
        if isinstance(metadata, dict) and all(name in metadata for name in FEATURES):
            style = style_of(metadata)
        else:
            text, counted = _answer(check, row), counted + 1
            style = [float(len(pieces(text))), *markdown_counts(text).values()]
        twice += not once(found, key, style, check, "uid")
    said = f"{counted} answers have no metadata: their length is in words, not in the published tokens"
    return found, doubles(twice) + ([said] if counted else [])


def _answer(check: Checker, row: dict[str, Any]) -> str:
    messages = check.array(check.need(row, "messages"), "messages", at_least=1)
    content = check.need(check.mapping(messages[-1], "messages[-1]"), "content", "messages[-1]")
    content = content.get("answer") if isinstance(content, dict) else content
    return check.text(content, "messages[-1].content")


def _category(
    result: SuiteResult,
    category: str,
    battles: Sequence[Battle],
    styles: Mapping[tuple[str, str], list[float]],
    seed: int,
) -> None:
    """Add one category's figures to the result."""
    if len(baselines := dict.fromkeys(battle.baseline for battle in battles)) > 1:
        raise InputError(
            f"category {category!r} has several baselines ({', '.join(baselines)}); name one with --baseline"
        )
    models = sorted({battle.model for battle in battles})
    plain, controlled, refits = _fits(category, battles, models, styles, seed)
    ends = ("", " style controlled")
    rows = []
    for number, model in enumerate(models):
        shown: list[Any] = [model]
        for end, values in zip(ends, (plain, controlled), strict=True):
            if values is None:
                continue
            low, high = percentile_interval(values[1:, number])
            name = f"{category}: {model}{end}"
            result.metrics[name], result.ci95[name] = float(values[0, number]), (low, high)
            shown += [100 * float(values[0, number]), interval((100 * low, 100 * high))]
        rows.append([*shown, sum(b.model == model for b in battles) // 2])
    if refits is not None:
        result.metrics |= {
            f"{category}: weight of {name}": float(v) for name, v in zip(FEATURES, refits.styles, strict=True)
        }
    rows.sort(key=lambda row: -row[3 if controlled is not None else 1])
    columns = ["model", "win rate", "95 % interval"] + (
        ["style controlled", "95 % interval"] if controlled is not None else []
    )
    note = f"percent, against {battles[0].baseline}, which stands at 50; intervals resample prompts"
    result.tables.append(Table(f"Arena-Hard, {category}", [*columns, "prompts"], rows, note))


def _fits(
    category: str,
    battles: Sequence[Battle],
    models: Sequence[str],
    styles: Mapping[tuple[str, str], list[float]],
    seed: int,
) -> tuple[Array, Array | None, Fit | None]:
    """(1 + draws, M) win rates, the estimate first, as they are and at equal style; and the style-controlled fit."""
    index = {model: number for number, model in enumerate(models)}
    at = np.array([index[battle.model] for battle in battles])
    points, weights = np.array([b.points for b in battles]), np.array([float(b.weight) for b in battles])
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(b.prompt for b in battles))}
    unit = np.array([prompts[battle.prompt] for battle in battles])
    rng = np.random.default_rng(seed)
    features, whole = None, None
    if styles:
        own, other = (_matrix(battles, styles, side, category) for side in ("model", "baseline"))
        features = normalised(differences(own, other), weights)
        whole = fit(at, features, points, weights, len(models))
    plain, controlled = [_means(at, points, weights, len(models))], [whole.win_rates] if whole else []
    for _ in range(REFITS):
        drawn = weights * np.bincount(rng.integers(len(prompts), size=len(prompts)), minlength=len(prompts))[unit]
        plain.append(_means(at, points, drawn, len(models)))
        if features is not None:
            controlled.append(fit(at, features, points, drawn, len(models), whole).win_rates)
    return np.array(plain), np.array(controlled) if controlled else None, whole


def _means(at: Array, points: Array, weights: Array, count: int) -> Array:
    below = np.bincount(at, weights, count)
    # A resample without any game of a model says nothing about it.
    return np.divide(np.bincount(at, weights * points, count), below, out=np.full(count, 0.5), where=below > 0)


def _matrix(
    battles: Sequence[Battle], styles: Mapping[tuple[str, str], list[float]], side: str, category: str
) -> Array:
    """(R, 4) style of one side's answers."""
    keys = [(getattr(battle, side), battle.prompt) for battle in battles]
    if missing := list(dict.fromkeys(f"{model}/{prompt}" for model, prompt in keys if (model, prompt) not in styles)):
        raise InputError(f"style of {category}: --answers lacks {len(missing)} answers: {some(missing)}")
    return np.array([styles[key] for key in keys])
