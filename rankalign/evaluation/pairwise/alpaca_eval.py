"""AlpacaEval's numbers from its annotations: win rate as published, and at equal length, without a download."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankalign.data.formats.alpaca_eval import win_probability
from rankalign.data.records import Checker
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.pairwise.equal_length import (
    Joint,
    Judged,
    fit_jointly,
    length_controlled,
    length_decides,
    lengths_overlap,
)
from rankalign.evaluation.statistics import Array, mean_interval
from rankalign.evaluation.tables import Table, interval, some
from rankalign.registry import did_you_mean
from rankalign.storage.jsonl import OnError, read_rows


@dataclass(frozen=True)
class Annotation:
    """One judgement of a model's answer against the reference's.

    Attributes:
        model: whose answer.
        prompt: what identifies the prompt.
        win: chance that the model's answer is better, 0 to 1; None where the judge could not be parsed.
        lengths: characters of the reference's and of the model's answer; None where the texts are not at hand.
        reference: whose answer it is set against.
        annotator: who judged.
        texts: both answers, to tell a second judgement of one answer from one of another.
    """

    model: str
    prompt: str
    win: float | None
    lengths: tuple[int, int] | None = None
    reference: str = ""
    annotator: str = ""
    texts: tuple[str, str] | None = None

    @property
    def group(self) -> tuple[str, str, str]:
        """What one row of a leaderboard is about."""
        return self.model, self.reference, self.annotator


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
        win = win_probability(None if raw is None else float(check.number(raw, "preference")))
    except ValueError as error:
        raise check.fail("preference", str(error)) from None
    model = check.text(row.get("model") or check.need(row, "generator_2"), "generator_2", empty=False)
    prompt = str(row["prompt_id"]) if "prompt_id" in row else check.text(check.need(row, "instruction"), "instruction")
    given = [row.get(f"output_{k}") for k in (1, 2)]
    texts = (str(given[0]), str(given[1])) if None not in given else None
    lengths = (len(texts[0]), len(texts[1])) if texts else None
    reference, annotator = (str(row.get(name) or "") for name in ("generator_1", "annotator"))
    return Annotation(model, prompt, win, lengths, reference, annotator, texts)


@dataclass
class Leaderboard:
    """Rows by model, reference and annotator, best first; keys are those of AlpacaEval's files where it has them.

    Attributes:
        rows: one a (model, reference, annotator).
        duplicates: annotations that stood in the file twice and were dropped.
        remarks: what to know of the set.
    """

    rows: list[dict[str, Any]]
    duplicates: int = 0
    remarks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"leaderboard": self.rows, "duplicates": self.duplicates, "remarks": self.remarks}

    def table(self) -> Table:
        """The leaderboard for people; references and annotators have columns where there are several."""
        several = [key for key in ("reference", "annotator") if len({row[key] for row in self.rows}) > 1]
        rows = []
        for row in self.rows:
            known = [row["model"], *(row[key] for key in several), row["win_rate"], row["standard_error"]]
            rows.append([*known, interval(row["ci95"]), _at_equal_length(row), row["n"], row["unparsed"]])
        columns = ["model", *several, "win rate", "standard error", "95 % interval", "at equal length", "n", "unparsed"]
        return Table("Win rates in percent", columns, rows, "intervals bootstrapped over prompts")


def _at_equal_length(row: dict[str, Any]) -> float | str | None:
    return "lengths do not overlap" if row.get("length_overlap") is False else row.get("length_controlled_winrate")


def leaderboard(annotations: Sequence[Annotation], seed: int = 0, baseline: str = "") -> Leaderboard:
    """A row for every model, reference and annotator of the annotations, best win rate first.

    Args:
        annotations: as :func:`read_annotations` gives them.
        seed: seed of the bootstrap.
        baseline: the one reference to show; empty shows all.

    Raises:
        InputError: there are no annotations, none has a preference, ``baseline`` is no reference of theirs, or a prompt
            was judged twice with different preferences.
    """
    if not annotations:
        raise InputError("there are no annotations")
    references = list(dict.fromkeys(annotation.reference for annotation in annotations))
    if baseline and baseline not in references:
        raise InputError(
            f"--baseline {baseline!r} is no reference of the annotations{did_you_mean(baseline, references)}"
        )
    kept, duplicates = _once([a for a in annotations if baseline in ("", a.reference)])
    tables: dict[tuple[str, str], dict[str, list[Annotation]]] = {}
    for annotation in kept:
        table = tables.setdefault((annotation.reference, annotation.annotator), {})
        table.setdefault(annotation.model, []).append(annotation)
    rows, remarks = [], [f"{duplicates} annotations stand in the file twice and were dropped"] * (duplicates > 0)
    for by_model in tables.values():
        # By reference and annotator: how hard a prompt is depends on whom one has to beat, and before whom.
        joint = fit_jointly(row for own in by_model.values() for row in _judged(own))
        everything = dict.fromkeys(annotation.prompt for own in by_model.values() for annotation in own)
        for model, own in by_model.items():
            rows.append(_row(model, own, joint, seed))
            asked = {annotation.prompt for annotation in own}
            if missing := [prompt for prompt in everything if prompt not in asked]:
                remarks.append(f"{model}: {len(missing)} prompts that others answered are missing: {some(missing)}")
    return Leaderboard(sorted(rows, key=lambda row: -row["win_rate"]), duplicates, remarks)


def _judged(annotations: Iterable[Annotation]) -> list[Judged]:
    """What a fit takes of annotations with texts and a preference."""
    known = ((a, a.win, a.lengths) for a in annotations)
    return [(a.model, a.prompt, win, float(both[1] - both[0])) for a, win, both in known if win is not None and both]


def _once(annotations: Iterable[Annotation]) -> tuple[list[Annotation], int]:
    """The annotations less those that stand there again, and how many those were.

    Raises:
        InputError: a second one says something else, so that nobody can know which counts.
    """
    found: dict[tuple[str, ...], Annotation] = {}
    dropped = 0
    for annotation in annotations:
        earlier = found.setdefault((*annotation.group, annotation.prompt), annotation)
        if earlier is not annotation and earlier != annotation:
            model, reference, annotator = annotation.group
            raise InputError(
                f"{model} against {reference} by {annotator or 'one annotator'}: prompt {annotation.prompt[:60]!r} was "
                f"judged twice with different preferences or answers; keep one of them"
            )
        dropped += earlier is not annotation
    return list(found.values()), dropped


def _row(model: str, own: Sequence[Annotation], joint: Joint | None, seed: int) -> dict[str, Any]:
    parsed = [(a, a.win) for a in own if a.win is not None]
    if not parsed:
        raise InputError(f"no judgement of {model!r} has a preference")
    wins = np.array([win for _, win in parsed])
    n, better, worse = len(wins), int((wins > 0.5).sum()), int((wins < 0.5).sum())
    row: dict[str, Any] = {
        "model": model, "reference": own[0].reference, "annotator": own[0].annotator,
        "win_rate": 100 * math.fsum(wins) / n,
        "standard_error": 100 * float(wins.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        "ci95": [100 * bound for bound in mean_interval(wins, seed=seed).interval],
        "n": n, "unparsed": len(own) - n, "n_wins": better, "n_wins_base": worse, "n_draws": n - better - worse,
        "discrete_win_rate": 100 * (better + (n - better - worse) / 2) / n,
    }  # fmt: skip
    lengths = [a.lengths for a, _ in parsed if a.lengths]
    return row | (_at_length(parsed, np.array(lengths, dtype=np.float64), joint, seed) if len(lengths) == n else {})


def _at_length(
    parsed: Sequence[tuple[Annotation, float]], lengths: Array, joint: Joint | None, seed: int
) -> dict[str, Any]:
    """What can be said of length and win rate, from the judgements and (P, 2) lengths of reference and model."""
    wins, longer = np.array([win for _, win in parsed]), lengths[:, 1] - lengths[:, 0]
    won = np.sign(wins - 0.5) * np.sign(longer)
    found: dict[str, Any] = {
        "avg_length": int(lengths[:, 1].mean()),
        "longer_wins": [int((won > 0).sum()), int((won != 0).sum())],
        "length_overlap": lengths_overlap(longer),
        "length_decides": length_decides(wins, longer),
    }
    if not found["length_overlap"]:
        return found
    known = np.array([joint.difficulty[a.prompt] for a, _ in parsed]) if joint else None
    controlled = length_controlled(wins, longer, seed=seed, difficulty=known, usual=joint.usual if joint else None)
    return found | {
        "length_controlled_winrate": 100 * controlled.value,
        "lc_ci95": [100 * bound for bound in controlled.interval],
        "difficulty_term": known is not None,
    }
