"""One self-contained HTML page of a run: no request leaves it, and no text in it is ever markup."""

from __future__ import annotations

import dataclasses
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankalign.data.records import CandidateSet, score_of
from rankalign.evaluation import EvalResult, drawn, scored
from rankalign.evaluation.raters.reward import evaluate_reward
from rankalign.evaluation.report import plots
from rankalign.evaluation.report.checks import check_tables, training_warnings
from rankalign.evaluation.report.curves import BARE, panels, points
from rankalign.evaluation.report.example_texts import Texts, texts_of
from rankalign.evaluation.report.hack import find_hacks, length_correlation
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.evaluation.report.samples import sample_of, samples, sides
from rankalign.evaluation.report.summary import best_checkpoint, headline, training_alone
from rankalign.evaluation.report.templating import fill
from rankalign.evaluation.tables import Table, from_dict
from rankalign.evaluation.texts.lexical import evaluate_lexical, length
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import write_rows

MOST_EXAMPLES = 10  # of each kind
MANY_SUSPECTS = 0.3  # share of examples above which it is the model that has not learned, not the labels that are wrong
# Rows of the table before and after: metric, its label, and whether it is a share; a row without values is left out.
MEASURES = (
    ("reward", "Reward", False),
    ("length", "Length, words", False),
    ("repetition", "Repeated 3-grams", True),
    ("thought_words", "Thoughts, words", False),
    ("thought_repetition", "Repeated 3-grams in thoughts", True),
    ("distinct_2", "Distinct-2", True),
    ("perplexity", "Perplexity, start model", False),
    ("kl", "KL to the start model, nats an answer", False),
    ("list_density", "List items, of lines", True),
    ("copying", "4-grams of the prompt", True),
    ("refusal", "Refusals", True),
)


def write_report(folder: str | os.PathLike[str], target: str | os.PathLike[str] = "") -> Path:
    """Write a page from what is in a run folder, ``report.html`` there where no other ``target`` is named; its path.

    Where there are more prompts than the page shows, ``report.samples.jsonl`` beside it has all of them, a line each.

    Read are, each if present: ``result.json`` (keys of the demo's result; ``judge`` and ``tables`` are optional),
    ``log.jsonl`` (or that in ``train`` or ``model``), ``candidates.jsonl``, ``before.jsonl``, ``after.jsonl`` (scored
    records of the same held-out prompts), ``ledger.jsonl``, ``kl.json``, ``numerics.json``, ``lint.json``,
    ``audit.json``, ``agreement.json``, ``suite.json`` (what ``rankalign eval``, ``lint`` and ``compare`` print with
    ``--json``), and all ``manifest.json`` and ``*.manifest.json``.

    Raises:
        InputError: the folder holds none of these, a file is broken, or Jinja2 or matplotlib is missing.
    """
    run, path = read_run(folder), Path(target) if str(target) else Path(folder) / "report.html"
    table = path.with_name(f"{path.stem}.samples.jsonl")
    page = render(run, table.name)
    shown, total = samples(run)
    if len(shown) < total:
        write_rows(table, (dataclasses.asdict(sample_of(*pair, run.judge)) for pair in sides(run)))
    else:
        table.unlink(missing_ok=True)  # of an earlier page
    write_text(path, page)
    return path


# --- what it says ------------------------------------------------------------------------------------------------


def remarks(run: Run, warned: int) -> list[tuple[str, str]]:
    """What else a reader should know first, each with the section that has more of it.

    Args:
        run: the run.
        warned: how many warnings training gave.
    """
    best = best_checkpoint(run.log, run.training, run.checkpoints)
    suspects, of = (len(run.ledger.mislabelled), len(run.ledger.examples)) if run.ledger else (0, 0)
    if suspects > MANY_SUSPECTS * of:
        wrong = (
            f"{suspects} of {of} training examples are ranked against their scores: so many say more about how little "
            "of the ranking was learned than about the scores."
        )
    else:
        are = "is" if suspects == 1 else "are"
        wrong = f"{suspects} of {of} training examples {are} probably labelled the wrong way round."
    times = "a warning" if warned == 1 else f"{warned} warnings"
    found = (
        (best is not None, best.sentence() if best else "", "training"),
        (warned > 0, f"Training gave {times}.", "training"),
        (suspects > 0, wrong, "ledger"),
    )
    return [(sentence, section) for holds, sentence, section in found if holds]


def rewards_of(run: Run) -> dict[str, EvalResult]:
    """Rewards of the records ``before``, ``after`` and ``candidates``, of those that have any."""
    sides = {"before": run.before, "after": run.after, "candidates": run.candidates}
    known = {name: sets for name, sets in sides.items() if any(scored(record, run.judge) for record in sets)}
    return {name: evaluate_reward(sets, run.judge) for name, sets in known.items()}


def before_after(run: Run, rewards: Mapping[str, EvalResult]) -> Table:
    """Reward and the measures beside it, before and after, as far as they are known."""
    old, new = (_measures(run, rewards, when) for when in ("before", "after"))
    rows: list[list[Any]] = []
    for name, label, share in MEASURES:
        before, after = old.get(name), new.get(name)
        if before is not None or after is not None:
            change = None if before is None or after is None else after - before
            rows.append([label, _shown(before, share), _shown(after, share), _change(change, share)])
    known = (("mean", "train_mean_reward"), ("best of each prompt", "train_max_reward"))
    parts = [f"{label} {run.result[key]:.3g}" for label, key in known if key in run.result]
    notes = [f"Reward of the training candidates: {', '.join(parts)}."] if parts else []
    if any(str(row[3]).endswith("points") for row in rows):
        notes.append("Changes of shares are in percentage points.")
    return Table("Before and after", ["", "before", "after", "change"], rows, " ".join(notes))


def _shown(value: float | None, share: bool) -> str | None:
    if value is None:
        return None
    return (f"{100 * value:.1f} %" if share else f"{value:.3g}").replace("-", "\N{MINUS SIGN}", 1)


def _change(value: float | None, share: bool) -> str | None:
    if value is None:
        return None
    text = f"{100 * value:+.1f}" if share else f"{value:+.3g}"
    text = text[1:] if not float(text) else text.replace("-", "\N{MINUS SIGN}", 1)  # nothing has no sign
    return f"{text} points" if share else text


def _measures(run: Run, rewards: Mapping[str, EvalResult], when: str) -> dict[str, float]:
    """What is known of one side: from its records where they are there, else from ``result.json``."""
    keys = ("reward", "length", "repetition", "perplexity", "kl")
    found = {key: value for key in keys if (value := run.result.get(f"{key}_{when}")) is not None}
    if when == "after" and run.kl is not None:
        found["kl"] = run.kl
    sets = run.before if when == "before" else run.after
    if sets:
        texts = evaluate_lexical(sets).metrics
        found |= texts | ({"length": texts["words"]} if "words" in texts else {})
    if when in rewards:
        found["reward"] = rewards[when].metrics["mean"]
    return found


# --- figures -----------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """One drawing: a heading, SVG markup, a caption, and the names of its coloured series in order."""

    title: str
    svg: str
    caption: str = ""
    legend: list[str] = field(default_factory=list)


def reward_figures(run: Run, rewards: Mapping[str, EvalResult]) -> list[Figure]:
    """Rewards before, after and of the training candidates; distributions; reward against length."""
    old, new = _lengths_and_scores(run.before, run.judge), _lengths_and_scores(run.after, run.judge)
    figures, sides, label = list(_levels(run, rewards)), ["before", "after"], f"reward ({run.judge})"
    if old and new:
        title = "Distribution on held-out prompts"
        svg = plots.histogram("histogram", title, [s for _, s in old], [s for _, s in new], label)
        figures.append(Figure(title, svg, "", sides))
        title = "Reward against length"
        svg = plots.scatter("scatter", title, old, new, ("length in words", label), whole=True)
        figures.append(Figure(title, svg, f"{_correlation(run)} {_drawn(max(len(old), len(new)))}".strip(), sides))
    by: dict[str, array[float]] = {}
    for record in run.candidates:
        for response in drawn(record):
            if (score := score_of(record, response, run.judge)) is not None:
                by.setdefault(response.policy, array("d")).append(score)
    if by := {policy: scores for policy, scores in by.items() if scores}:
        title = "Training candidates by policy"
        caption = "From 5 % to 95 % (thin), quartiles (thick), median (tick) and mean (dot)."
        figures.append(Figure(title, plots.spreads("policies", title, by, label), caption))
    return figures


def _drawn(count: int) -> str:
    """What a caption says of points that were left out."""
    return f"{plots.MOST_POINTS} of {count} points, drawn at random." if count > plots.MOST_POINTS else ""


def _lengths_and_scores(sets: Sequence[CandidateSet], judge: str) -> list[tuple[float, float]]:
    draws = ((record, response) for record in sets for response in drawn(record))
    return [(length(r), s) for record, r in draws if (s := score_of(record, r, judge)) is not None]


def _levels(run: Run, rewards: Mapping[str, EvalResult]) -> Iterable[Figure]:
    values: dict[str, tuple[float, tuple[float, float] | None]] = {}
    for key in ("before", "after"):
        if key in rewards:
            values[key] = (rewards[key].metrics["mean"], rewards[key].ci95["mean"])
        elif f"reward_{key}" in run.result:
            values[key] = (float(run.result[f"reward_{key}"]), None)
    if result := rewards.get("candidates"):
        values |= {f"candidates, {k}": (result.metrics[k], result.ci95[k]) for k in ("mean", "max")}
    else:
        keys = (("candidates, mean", "train_mean_reward"), ("candidates, max", "train_max_reward"))
        values |= {label: (float(run.result[key]), None) for label, key in keys if key in run.result}
    if len(values) > 1:
        caption = (
            "With 95 % intervals over prompts. RRHF’s authors expect the trained model near the best of its training "
            "candidates, “max” here; training and held-out prompts differ."
        )
        yield Figure("Mean reward", plots.dots("levels", "Mean reward", values, f"reward ({run.judge})"), caption)


def _correlation(run: Run) -> str:
    parts = []
    for name, sets in (("before", run.before), ("after", run.after)):
        if (found := length_correlation(sets, run.judge)) is not None:
            parts.append(f"{name} {found.value:.2f} ({found.interval.low:.2f} to {found.interval.high:.2f})")
    return f"Correlation over prompts, with 95 % intervals: {', '.join(parts)}." if parts else ""


def training_figures(log: list[dict[str, Any]]) -> list[Figure]:
    """Curves of the training log, one panel a kind of quantity."""
    figures: list[Figure] = []
    for title, names in panels({name for row in log for name in row}).items():
        series: dict[str, list[tuple[float, float]]] = {}
        for name in names:
            own = points(log, name)
            if own and own not in series.values():  # a loss with one part is shown once
                series[name] = own
        if series:
            svg = plots.curves(f"curve{len(figures)}", title, series, smooth=title not in BARE)
            figures.append(Figure(title, svg, "", list(series) if len(series) > 1 else []))
    return figures


@dataclass
class Finding:
    """Training examples to look at, of one kind: their figures, and their texts in the same order.

    Attributes:
        table: the figures.
        kind: ``mislabelled`` or ``hardest``.
        texts: of those whose texts are at hand.
    """

    table: Table
    kind: str
    texts: list[Texts]


def ledger_parts(run: Run) -> tuple[list[Figure], list[Finding], str]:
    """How losses and orders of single examples went, the examples to look at, and which texts are missing."""
    if run.ledger is None:
        return [], [], ""
    found, figures = run.ledger, list[Figure]()
    places = [(e.margin, e.last_loss) for e in found.examples if e.margin is not None and e.last_loss is not None]
    if len(places) > 1:
        title, suspects = "Loss against margin", {(e.margin, e.last_loss) for e in found.mislabelled}
        rest = [point for point in places if point not in suspects]
        labels = ("mean margin over epochs", "loss in the last epoch")
        svg = plots.scatter("ledger", title, [p for p in places if p in suspects], rest, labels)
        caption = "One point an example: rings are ranked against their scores over the epochs."
        caption = f"{caption} {_drawn(max(len(suspects), len(rest)))}".strip()
        figures.append(Figure(title, svg, caption))
    lists = [found.mislabelled[:MOST_EXAMPLES], found.hardest[:MOST_EXAMPLES]]
    texts, missing = texts_of(run, list(dict.fromkeys(example.id for own in lists for example in own)))
    findings = [
        Finding(table, kind, [texts[example.id] for example in own if example.id in texts])
        for kind, own, table in zip(("mislabelled", "hardest"), lists, found.tables(MOST_EXAMPLES), strict=True)
        if own
    ]
    return figures, findings, missing


# --- the page ----------------------------------------------------------------------------------------------------


def render(run: Run, samples_file: str = "report.samples.jsonl") -> str:
    """The page as HTML; ``samples_file`` is where all samples lie if they are too many for it.

    Raises:
        InputError: Jinja2 or matplotlib is missing.
    """
    flags = find_hacks(run.before, run.after, run.judge) if run.before and run.after else []
    shown, total = samples(run)
    warnings, top, rewards = training_warnings(run.log), headline(run, flags), rewards_of(run)
    tables = [from_dict(row) for row in run.result.get("tables", [])]
    return fill(
        "report",
        alone="" if top else training_alone(run),
        run=run, headline=top, said=remarks(run, len(warnings)), flags=flags, tables=tables,
        table=before_after(run, rewards), figures=reward_figures(run, rewards), curves=training_figures(run.log),
        samples=shown, total=total,
        warnings=warnings, ledger=ledger_parts(run), checks=check_tables(run.checks),
        samples_file=samples_file, data=embed(run.result),
    )  # fmt: skip


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
