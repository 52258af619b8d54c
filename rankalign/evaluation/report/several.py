"""Several runs on one page: what their settings differ in, what came out of each, and their curves over each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.evaluation.pairwise.scores import compare_by_score
from rankalign.evaluation.report import plots
from rankalign.evaluation.report.checks import training_warnings
from rankalign.evaluation.report.curves import BARE, panels, points
from rankalign.evaluation.report.hack import find_hacks
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.evaluation.report.summary import Headline, best_checkpoint, headline, win_bounds
from rankalign.evaluation.report.templating import fill, signed
from rankalign.evaluation.tables import Table, interval
from rankalign.storage import manifest
from rankalign.storage.files import read_text, write_text
from rankalign.storage.jsonl import dumps, loads

NAME = "runs.html"
# Where a run lies, and how it was begun, is no difference between runs.
PLACES = frozenset({"output", "output_dir", "overwrite", "run_name", "resume"})
ENDS = ("loss", "ranking_accuracy", "margin", "eval_loss", "eval_ranking_accuracy", "eval_win_rate", "reward", "kl")
"""Figures of the log whose last value is shown."""
LONGEST = 60
"""Characters of a setting's value."""
_ABSENT = object()


@dataclass
class Compared:
    """A run with what the page says of it.

    Attributes:
        name: its folder's name, with as much of the path before it as tells it from the others.
        run: what it holds.
        settings: by dotted name; empty where they are not known.
        top: how its held-out reward changed; None where it has no such result.
        flags: names of the bad habits that training brought.
    """

    name: str
    run: Run
    settings: dict[str, Any] = field(default_factory=dict)
    top: Headline | None = None
    flags: list[str] = field(default_factory=list)


def write_comparison(folders: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str] = "") -> Path:
    """Write one page of several runs, and return its path.

    Args:
        folders: of the runs, two or more.
        target: the page; empty takes ``runs.html`` in the folder that all of them lie in.

    Raises:
        InputError: a run stands there twice, or holds nothing to report on; Jinja2 or matplotlib is missing.
    """
    places = [Path(folder).resolve() for folder in folders]
    if twice := next((str(f) for n, f in enumerate(folders) if places[n] in places[:n]), ""):
        raise InputError(f"{twice} is named twice; a run is compared with others")
    path = Path(target) if str(target) else Path(os.path.commonpath([place.parent for place in places])) / NAME
    names = short_names(places)
    page = render(
        [_compared(name, read_run(folder), place) for name, folder, place in zip(names, folders, places, strict=True)]
    )
    write_text(path, page)
    return path


def short_names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many more as make all of them different."""
    for count in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _compared(name: str, run: Run, place: Path) -> Compared:
    flags = find_hacks(run.before, run.after, run.judge) if run.before and run.after else []
    return Compared(name, run, settings_of(run, place), headline(run, flags), [flag.name for flag in flags])


# --- settings ----------------------------------------------------------------------------------------------------


def settings_of(run: Run, place: Path) -> dict[str, Any]:
    """Settings by dotted name, from the run's manifest, or from what it noted when it began; none where neither is."""
    own = run.manifests.get("manifest.json", {}).get("settings")
    if own is None and (place / manifest.CLAIM).is_file():
        try:
            own = loads(read_text(place / manifest.CLAIM))
        except ValueError as error:
            raise InputError(f"{place / manifest.CLAIM}: {error}") from None
    training = run.training
    outer = {
        key: value for key, value in (own or {}).items() if key not in training and not (training and key == "train")
    }
    found = {**training, **outer}
    return dict(_flat(found)) if found else {}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf below ``value`` with the way to it; lists of objects are gone into, lists of values are one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if name or key not in PLACES:
                yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    else:
        yield name, value


def settings_table(runs: Sequence[Compared]) -> Table:
    """The settings that are not the same in all runs whose settings are known, a column a run."""
    known = [item for item in runs if item.settings]
    names = sorted({name for item in known for name in item.settings})
    rows: list[list[Any]] = []
    for name in names:
        values = [item.settings.get(name, _ABSENT) for item in known]
        if any(value != values[0] for value in values):
            rows.append([name, *(_value(item.settings.get(name, _ABSENT)) for item in runs)])
    same = len(names) - len(rows)
    note = f"{same} other settings are the same in all." if len(known) > 1 else ""
    return Table("Settings that differ", ["", *(item.name for item in runs)], rows, note)


def _value(value: Any) -> str | None:
    if value is _ABSENT:
        return None
    text = value if isinstance(value, str) and value else dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


# --- what came out -----------------------------------------------------------------------------------------------


def outcome_table(runs: Sequence[Compared]) -> Table:
    """Held-out reward of each run, and the habits that came with it."""
    columns = ["", "reward change", "95 % interval", "win rate", "95 % interval ", "prompts", "flags"]
    rows: list[list[Any]] = []
    for item in runs:
        if (top := item.top) is not None:
            win = None if top.win_rate is None else f"{100 * top.win_rate:.1f} %"
            bounds = " to ".join(f"{100 * bound:.1f}" for bound in top.win_bounds) + " %" if top.win_bounds else None
            flags = ", ".join(item.flags) or ("none" if item.run.before and item.run.after else None)
            rows.append([item.name, signed(top.value), interval(top.bounds), win, bounds, top.n, flags])
    note = (
        "Held-out reward after minus before, and how often it rose (ties half), each against the run's own start model."
    )
    return Table("What came out", columns, rows, note)


def ends_table(runs: Sequence[Compared]) -> Table:
    """The last logged value of each figure, the best checkpoint, and how many warnings training gave."""
    names = [name for name in ENDS if any(points(item.run.log, name) for item in runs)]
    rows: list[list[Any]] = []
    for item in runs:
        if log := item.run.log:
            last = [own[-1][1] if (own := points(log, name)) else None for name in names]
            best = best_checkpoint(log, item.run.training, item.run.checkpoints)
            steps = max((int(row["step"]) for row in log if isinstance(row.get("step"), int | float)), default=None)
            rows.append([item.name, steps, *last, best and best.step, len(training_warnings(log))])
    columns = ["", "steps", *(name.replace("_", " ") for name in names), "best at step", "warnings"]
    return Table(
        "At the end of training", columns, rows, "The last logged values. Losses of unlike methods have unlike scales."
    )


def duel_table(runs: Sequence[Compared]) -> Table:
    """Every other run against the first that has answers, on the same held-out prompts and by the same judge."""
    first, rows = next((item for item in runs if _answered(item)), None), []
    for item in runs:
        if first is not None and item is not first and _answered(item) and item.run.judge == first.run.judge:
            try:
                (s,) = compare_by_score(item.run.after, first.run.after, item.run.judge).systems
            except InputError:
                continue  # other prompts; the notes say so
            bounds = " to ".join(f"{100 * bound:.1f}" for bound in win_bounds(s)) + " %"
            rows.append([item.name, s.win, s.tie, s.loss, f"{100 * s.win_rate:.1f} %", bounds, signed(s.difference)])
    columns = ["", "better", "same", "worse", "win rate", "95 % interval", "difference in reward"]
    return Table(f"Held-out answers against those of {first.name if first else ''}", columns, rows)


def _answered(item: Compared) -> bool:
    return bool(item.run.after and item.run.judge)


def notes(runs: Sequence[Compared]) -> list[str]:
    """What is missing or makes runs hard to compare, a sentence each."""
    unknown = [item.name for item in runs if not item.settings]
    flat = [item.name for item in runs if not points_of_any(item.run.log)]
    unmeasured = [item.name for item in runs if item.top is None]
    lacks = (
        (unknown, "no manifest and no settings.json, so it is not finished and its settings are not known"),
        (flat, "no log.jsonl with steps, so it has no curves"),
        (unmeasured, "no held-out result (before.jsonl and after.jsonl with scores, or result.json)"),
    )
    found = [f"{', '.join(names)}: {words}." for names, words in lacks if names]
    judges = {item.run.judge for item in runs if item.top is not None}
    if len(judges) > 1:
        found.append(f"The judges differ ({', '.join(sorted(judges))}): rewards of these runs are on different scales.")
    prompts = {item.name: _prompts(item.run) for item in runs if item.run.after}
    odd = [name for name, own in prompts.items() if own != next(iter(prompts.values()))]
    if odd:
        found.append(
            f"{', '.join(odd)}: other held-out prompts than {next(iter(prompts))}, so their rewards are not comparable."
        )
    return [*found, *(f"{item.name}: {note}" for item in runs for note in item.run.notes)]


def _prompts(run: Run) -> frozenset[int]:
    return frozenset(hash((record.id, dumps(record.prompt))) for record in run.after)


def points_of_any(log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether anything of a log can be drawn."""
    return any(points(log, name) for own in panels({n for row in log for n in row}).values() for name in own)


# --- the page ----------------------------------------------------------------------------------------------------


def figures(runs: Sequence[Compared]) -> list[tuple[str, str]]:
    """Heading and drawing of every figure of the logs that two runs or more, or the only one with a log, have."""
    names = {name for item in runs for row in item.run.log for name in row}
    found: list[tuple[str, str]] = []
    seen: list[dict[str, list[tuple[float, float]]]] = []
    for title, columns in panels(names).items():
        for column in columns:
            series = {item.name: own for item in runs if (own := points(item.run.log, column))}
            if series and series not in seen:  # a loss with one part is shown once
                seen.append(series)
                heading = title if len(columns) == 1 else f"{title}: {column.replace('_', ' ')}"
                order = [item.name for item in runs]
                found.append((heading, plots.overlay(f"over{len(found)}", heading, series, order, title not in BARE)))
    return found


def render(runs: Sequence[Compared]) -> str:
    """The page as HTML.

    Raises:
        InputError: Jinja2 or matplotlib is missing.
    """
    tables = [table for table in _tables(runs) if table.rows]
    styles = [plots.style(index) for index in range(len(runs))]
    names = [item.name for item in runs]
    return fill(
        "several", names=names, keys=list(zip(names, styles, strict=True)), notes=notes(runs), tables=tables,
        settings=settings_table(runs), known=sum(bool(item.settings) for item in runs), curves=figures(runs),
        most=plots.MOST_RUNS,
    )  # fmt: skip


def _tables(runs: Sequence[Compared]) -> Iterable[Table]:
    return outcome_table(runs), duel_table(runs), ends_table(runs)
