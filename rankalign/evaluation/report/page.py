"""One self-contained HTML page of a run: no request leaves it, and no text in it is ever markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankalign.data.records import CandidateSet, score_of
from rankalign.errors import missing_extra
from rankalign.evaluation import EvalResult, drawn, scored
from rankalign.evaluation.pairwise.scores import compare_by_score
from rankalign.evaluation.raters.reward import evaluate_reward
from rankalign.evaluation.report import plots
from rankalign.evaluation.report.checks import check_tables, training_warnings
from rankalign.evaluation.report.hack import REPETITION, Flag, find_hacks, length_correlation
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.evaluation.report.samples import sample_of, samples, sides
from rankalign.evaluation.tables import Table, cell, from_dict, interval, printable
from rankalign.evaluation.texts.lexical import evaluate_lexical, length
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import write_rows

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES = "report.samples.jsonl"
MOST_EXAMPLES = 10  # of each kind
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
# Columns of the training log by panel; a panel without any is left out.
CURVES = {
    "Loss": ("loss", "rank_loss", "sft_loss", "eval_loss"),
    "Ranking accuracy": ("ranking_accuracy", "eval_ranking_accuracy", "reward_accuracy"),
    "Margin": ("margin", "eval_margin"),
    "Reward while training": ("reward", "mean_reward"),
    "KL to the start model": ("kl", "approx_kl"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}


@dataclass
class Headline:
    """What came out, in one number and one paragraph.

    Attributes:
        value: held-out reward after minus before.
        bounds: its 95 % interval.
        n: held-out prompts.
        tone: ``good`` (rose), ``bad`` (fell), ``unclear`` (the interval includes zero) or ``doubt`` (rose, with flags).
        verdict: sentences.
    """

    value: float
    bounds: tuple[float, float]
    n: int
    tone: str
    verdict: str


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder from what is there, and return its path.

    Where there are more prompts than the page shows, ``report.samples.jsonl`` beside it has all of them, a line each.

    Read are, each if present: ``result.json`` (keys of the demo's result; ``judge`` and ``tables`` are optional),
    ``log.jsonl`` (or that in ``train`` or ``model``), ``candidates.jsonl``, ``before.jsonl``, ``after.jsonl`` (scored
    records of the same held-out prompts), ``ledger.jsonl``, ``kl.json``, ``numerics.json``, ``lint.json``,
    ``audit.json`` (what ``rankalign eval``, ``lint`` and ``compare`` print with ``--json``), and all ``manifest.json``
    and ``*.manifest.json``.

    Raises:
        InputError: the folder holds none of these, a file is broken, or Jinja2 or matplotlib is missing.
    """
    run, target = read_run(folder), Path(folder) / "report.html"
    page = render(run)
    table = target.with_name(SAMPLES)
    shown, total = samples(run)
    if len(shown) < total:
        write_rows(table, (dataclasses.asdict(sample_of(*pair, run.judge)) for pair in sides(run)))
    else:
        table.unlink(missing_ok=True)  # of an earlier page
    write_text(target, page)
    return target


# --- what it says ------------------------------------------------------------------------------------------------


def headline(run: Run, flags: list[Flag]) -> Headline | None:
    """The difference in held-out reward and what it means; None where the run has no such result."""
    if "difference" in run.result and "ci95" in run.result:
        value, bounds, n = run.result["difference"], run.result["ci95"], run.result.get("n_prompts", len(run.after))
    elif run.before and run.after and run.judge:
        (system,) = compare_by_score(run.after, run.before, run.judge).systems
        value, bounds, n = system.difference, system.ci95, system.n
    else:
        return None
    low, high = map(float, bounds)
    doubts = [flag.message for flag in flags] or _repetition(run.result)
    tone, sentence = _verdict(float(value), low, high)
    if doubts and tone == "good":
        tone = "doubt"
        sentence += " Something else rose with it, so look before you believe the reward:"
    return Headline(float(value), (low, high), int(n), tone, " ".join([sentence, *doubts]))


def _verdict(value: float, low: float, high: float) -> tuple[str, str]:
    size = f"{abs(value):.3g}"
    if low > 0:
        return "good", f"Held-out reward rose by {size}, and the interval lies above zero."
    if high < 0:
        return "bad", f"Held-out reward fell by {size}, and the interval lies below zero."
    return "unclear", "The interval includes zero: these prompts do not show that the reward changed either way."


def _repetition(result: dict[str, Any]) -> list[str]:
    """A rise of repetition, for runs whose texts are not at hand to test it."""
    before, after = result.get("repetition_before"), result.get("repetition_after")
    if before is None or after is None or after - before < REPETITION:
        return []
    return [f"The share of repeated 3-grams rose from {before:.1%} to {after:.1%}."]


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
            rows.append([label, _shown(before, share), _shown(after, share), _shown(change, share, "+")])
    known = (("mean", "train_mean_reward"), ("best of each prompt", "train_max_reward"))
    parts = [f"{label} {run.result[key]:.3g}" for label, key in known if key in run.result]
    note = f"Reward of the training candidates: {', '.join(parts)}." if parts else ""
    return Table("Before and after", ["", "before", "after", "change"], rows, note)


def _shown(value: float | None, share: bool, sign: str = "") -> str | None:
    if value is None:
        return None
    text = f"{100 * value:{sign}.1f} %" if share else f"{value:{sign}.3g}"
    return text.replace("-", "\N{MINUS SIGN}", 1)


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
        svg = plots.scatter("scatter", title, old, new, ("length in words", label))
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
    figures = []
    for number, (title, names) in enumerate(CURVES.items()):
        series: dict[str, list[tuple[float, float]]] = {}
        for name in names:
            points = _points(log, name)
            if points and points not in series.values():  # a loss with one part is shown once
                series[name] = points
        if series:
            svg = plots.curves(f"curve{number}", title, series, smooth=title != "Learning rate")
            figures.append(Figure(title, svg, "", list(series) if len(series) > 1 else []))
    return figures


def _points(log: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    rows = [(row.get("step"), row.get(name)) for row in log]
    return [(float(s), float(v)) for s, v in rows if isinstance(s, int | float) and isinstance(v, int | float)]


def ledger_parts(run: Run) -> tuple[list[Figure], list[Table]]:
    """How losses and orders of single examples went, and the examples to look at."""
    if run.ledger is None:
        return [], []
    found, figures = run.ledger, []
    points = [(e.margin, e.last_loss) for e in found.examples if e.margin is not None and e.last_loss is not None]
    if len(points) > 1:
        title, suspects = "Loss against margin", {(e.margin, e.last_loss) for e in found.mislabelled}
        rest = [point for point in points if point not in suspects]
        labels = ("mean margin over epochs", "loss in the last epoch")
        svg = plots.scatter("ledger", title, [p for p in points if p in suspects], rest, labels)
        caption = "One point an example: rings are ranked against their scores over the epochs."
        caption = f"{caption} {_drawn(max(len(suspects), len(rest)))}".strip()
        figures.append(Figure(title, svg, caption))
    return figures, [table for table in found.tables(MOST_EXAMPLES) if table.rows]


# --- the page ----------------------------------------------------------------------------------------------------


def render(run: Run) -> str:
    """The page as HTML.

    Raises:
        InputError: Jinja2 or matplotlib is missing.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise missing_extra("the report", "report") from None
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"cell": cell, "interval": interval, "printable": printable, "pretty": _pretty}
    flags = find_hacks(run.before, run.after, run.judge) if run.before and run.after else []
    shown, total = samples(run)
    top, rewards = headline(run, flags), rewards_of(run)
    tables = [from_dict(row) for row in run.result.get("tables", [])]
    return pages.get_template("report.html").render(
        run=run, headline=top, flags=flags, table=before_after(run, rewards), tables=tables,
        figures=reward_figures(run, rewards), curves=training_figures(run.log),
        samples=shown, total=total, samples_file=SAMPLES,
        warnings=training_warnings(run.log), ledger=ledger_parts(run), checks=check_tables(run.checks),
        # The page's content policy lets in what has these hashes and nothing else.
        css=css, script=script, css_hash=_hash(css), script_hash=_hash(script), data=embed(run.result),
    )  # fmt: skip


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _pretty(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False, indent=2))


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
