"""Several training runs that differ in some settings: planned and checked together, run one after another, one table.

Each run is a process of its own, so that one that fails, memory that runs out included, ends nothing but itself. Tokens
and reference log-probabilities are kept by content, so that runs share them without being told.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rankalign.config import read_yaml
from rankalign.errors import InputError, Interrupted
from rankalign.models import load as models
from rankalign.models.identity import config_of
from rankalign.recipes.apart import stop_with_parent
from rankalign.recipes.rollouts import reward_of
from rankalign.recipes.sweep_metric import Metric, last_line
from rankalign.storage import manifest
from rankalign.storage.files import read_text, write_text
from rankalign.storage.jsonl import dumps, read_rows
from rankalign.training.arguments import PPOConfig, TrainConfig, parse_settings
from rankalign.training.inputs import read_hashes
from rankalign.training.locate import locate
from rankalign.training.old_names import modernise

# Settings whose single value may hold commas: several values are given by naming the flag again.
WITH_COMMAS = frozenset({
    "data", "data_path", "dataset_name", "eval_data", "judge", "axes", "add_tokens", "system", "ignore_columns",
    "lora_target_modules", "lora_target", "report_to", "optim_args", "debug",
})  # fmt: skip
LAST_WORDS = 40
"""Lines of a run's stderr that are kept, to say why it failed."""

Point = dict[str, Any]
Start = Callable[[list[str]], tuple[int, str]]
"""Runs ``rankalign train`` with these words; gives the exit code and what it said last."""


@dataclass
class Run:
    """One run of a sweep.

    Attributes:
        point: the settings by which it differs from the others.
        folder: its ``output_dir``, named by those and by all that decides its result.
        content: all of its settings, as its YAML file has them.
        config: the same, checked.
        status: ``waiting``, ``finished`` or ``failed``.
        reason: why it failed.
        value: of the metric, at the end or, with ``load_best_model_at_end``, at the checkpoint that was kept.
        bounds: of its 95 % interval, where the log has one.
        facts: ``steps`` and ``seconds`` of its manifest.
    """

    point: Point
    folder: Path
    content: dict[str, Any]
    config: TrainConfig
    status: str = "waiting"
    reason: str = ""
    value: float | None = None
    bounds: tuple[float, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


# --- which runs -------------------------------------------------------------------------------------------------------


def grid(words: Sequence[str]) -> tuple[dict[str, Any], list[Point]]:
    """Flags of a sweep: those with one value, and the points of the grid that the others span.

    ``--beta 0.05,0.1`` has two values, and so has ``--judge rm --judge vader``, which is how several are written where
    one may hold commas (:data:`WITH_COMMAS`, and what is written in JSON). The last flag changes fastest.

    Raises:
        InputError: a word that belongs to no flag, or a value given twice.
    """
    values: dict[str, list[Any]] = {}
    for name, value in _pairs(words):
        whole = name in WITH_COMMAS or value is True or value.lstrip()[:1] in ("{", "[")
        values.setdefault(name, []).extend([value] if whole else [part.strip() for part in value.split(",")])
    for name, found in values.items():
        if "" in found or len(set(found)) < len(found):
            raise InputError(f"--{name} {','.join(map(str, found))}: a value is empty or given twice")
    fixed = {name: found[0] for name, found in values.items() if len(found) == 1}
    spanned = {name: found for name, found in values.items() if len(found) > 1}
    return fixed, [dict(zip(spanned, point, strict=True)) for point in itertools.product(*spanned.values())]


def _pairs(words: Sequence[str]) -> Iterable[tuple[str, Any]]:
    todo = deque(words)
    while todo:
        word = todo.popleft()
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected argument {word!r}; settings are written --name value[,value...]")
        name, equals, value = word[2:].partition("=")
        has_value = equals or (todo and not todo[0].startswith("--"))
        yield name.replace("-", "_"), (value if equals else todo.popleft()) if has_value else True


def read_list(path: str) -> list[Point]:
    """The runs of a file: a YAML list of mappings, or a JSON object a line.

    Raises:
        InputError: it holds something else.
    """
    if path.endswith((".yaml", ".yml")):
        try:
            points = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    else:
        points = [row for _, row in read_rows(path)]
    if not (isinstance(points, list) and points and all(isinstance(point, dict) and point for point in points)):
        raise InputError(f"{path}: expected a list of runs, each a mapping of the settings that differ")
    return points


def plan(
    file: str | None, words: Sequence[str], output: Path, listed: str = "", launch: Sequence[str] = ()
) -> list[Run]:
    """The runs of a sweep, every one checked as ``rankalign train`` checks its settings before any begins.

    Args:
        file: the YAML file that all share; None for flags alone.
        words: flags of ``rankalign train``, some with several values.
        output: folder of the sweep; each run's is in it.
        listed: file of further points, each combined with those of the flags.
        launch: flags of the launcher, which decide how many processes share an update.

    Raises:
        InputError: nothing differs, two runs are the same, or one has settings that do not fit; it names the run.
    """
    base: dict[str, Any] = read_yaml(file) if file else {}
    fixed, points = grid(words)
    if listed:
        points = [{**told, **point} for told in read_list(listed) for point in points]
    if len(points) < 2:
        raise InputError(
            "a sweep needs several values: --learning_rate 5e-7,1e-6, or --list FILE; else `rankalign train`"
        )
    runs: dict[str, Run] = {}
    contents: dict[str, dict[str, Any]] = {}
    for point in points:
        content = {**base, **fixed, **point}
        try:
            config = parse_settings(modernise(dict(content))[0], "sweep")
            digest = _digest(config, launch, contents)
        except InputError as error:
            raise InputError(f"run {_said(point)}: {error}") from None
        folder = output / f"{_slug(point)}-{digest[:8]}"
        if digest in runs:
            raise InputError(f"the runs {_said(runs[digest].point)} and {_said(point)} have the same settings")
        runs[digest] = Run(point, folder, {**content, "output_dir": str(folder)}, config)
    return list(runs.values())


def _digest(config: TrainConfig, launch: Sequence[str], contents: dict[str, dict[str, Any]]) -> str:
    """What decides a run's result, settings and content of what it reads, as a hash.

    Args:
        config: the run's settings.
        launch: flags of the launcher.
        contents: what was read already, which is not read again for the next run.
    """
    locate(config)  # once and for all: runs find their mixtures and downloads made
    key = dumps([config.data_settings.paths, config.model, config.method, config.use_lora])
    if key not in contents:
        contents[key] = read_hashes(config.data_settings, config.model_settings, config.method)
    graded: dict[str, Any] = {}
    if isinstance(config, PPOConfig):
        graded["reward_sha256"] = reward_of(config).fingerprint()
        graded["value_sha256"] = models.weights_of(config.value_model) if config.value_model else ""
        graded["value_config_sha256"] = config_of(config.value_model) if config.value_model else ""
    told = sorted({**config.own_settings(), **contents[key], **graded}.items())
    return hashlib.sha256(dumps([told, list(launch)]).encode()).hexdigest()


def _said(point: Point) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items())


def _slug(point: Point) -> str:
    """The settings as a name of a folder, of letters that need no quoting anywhere."""
    told = "_".join(f"{name}-{value}" for name, value in point.items())
    return re.sub(r"[^\w.+-]+", "-", told).strip("-.")[:80]


def best_of(runs: Iterable[Run], metric: Metric) -> Run | None:
    """The first of the best runs; None where none has the metric."""
    measured = [run for run in runs if run.value is not None]
    if not measured:
        return None
    return (max if metric.highest else min)(measured, key=lambda run: run.value or 0.0)


def _within(run: Run, best: Run) -> bool:
    """Whether a run's value lies in the best one's interval, or equals it where it has none."""
    low, high = best.bounds or (best.value, best.value)
    return None not in (run.value, low, high) and low <= run.value <= high  # type: ignore[operator]


# --- running them -----------------------------------------------------------------------------------------------------


def run_all(
    runs: Sequence[Run], metric: Metric, output: Path, start: Start, launch: Sequence[str] = ()
) -> dict[str, Any]:
    """Train what is not finished yet, and leave ``sweep.json``, which is written anew behind each run.

    Args:
        runs: of :func:`plan`.
        metric: what is best.
        output: folder of the sweep.
        start: trains one.
        launch: flags of the launcher.

    Returns:
        ``{"output", "metric", "direction", "runs", "finished", "failed", "best", "not_told_apart", "exit_code"}``:
        so many others lie within the best one's interval, or equal it where it has none; exit code 1 where one failed.

    Raises:
        Interrupted: one was; the same command goes on.
    """
    for number, run in enumerate(runs, start=1):
        print(f"run {number} of {len(runs)}: {_said(run.point)}", file=sys.stderr, flush=True)
        if not run.config.overwrite and run.folder.is_dir() and manifest.read(run.folder):
            print(f"{run.folder} is finished already: nothing to do", file=sys.stderr)
        else:
            settings = run.folder.with_name(f"{run.folder.name}.yaml")
            write_text(settings, yaml.safe_dump(run.content, sort_keys=False, allow_unicode=True))
            code, said = start(["--config", str(settings), *launch])
            if code == 130:
                raise Interrupted(f"stopped in run {number} of {len(runs)}; the same command goes on from there")
            if code:
                run.status, run.reason = "failed", said or f"exit code {code}"
                print(f"run {number} of {len(runs)} failed: {run.reason}", file=sys.stderr, flush=True)
        if run.status != "failed":
            _conclude(run, metric)
        write_text(output / "sweep.json", dumps(summary(runs, metric, output)) + "\n")
    return summary(runs, metric, output)


def _conclude(run: Run, metric: Metric) -> None:
    told, config = manifest.read(run.folder) or {}, run.config
    run.status, run.facts = "finished", {name: told.get(name) for name in ("steps", "seconds")}
    name = f"eval_{(config.metric_for_best_model or 'loss').removeprefix('eval_')}"
    keeps = f"{name}:{'max' if config.greater_is_better else 'min'}" if config.load_best_model_at_end else ""
    line = last_line(run.folder, metric, keeps) if metric.name else {}
    run.value = line.get(metric.name)
    low, high = (line.get(f"{metric.name.replace('ranking_', '')}_{end}") for end in ("low", "high"))
    run.bounds = None if low is None or high is None else (low, high)


def summary(runs: Sequence[Run], metric: Metric, output: Path) -> dict[str, Any]:
    """What a sweep returns and ``sweep.json`` holds."""
    best = best_of(runs, metric)
    alike = [run for run in runs if best and run is not best and _within(run, best)]
    rows = [
        {
            "run": run.folder.name,
            "settings": run.point,
            "status": run.status,
            **({metric.name: run.value} if metric.name else {}),
            **({"ci95": list(run.bounds)} if run.bounds else {}),
            **run.facts,
            **({"reason": run.reason} if run.reason else {}),
        }
        for run in runs
    ]
    failed = sum(run.status == "failed" for run in runs)
    return {
        "output": str(output),
        "metric": metric.name,
        "direction": ("max" if metric.highest else "min") if metric.name else "",
        "runs": rows,
        "finished": sum(run.status == "finished" for run in runs),
        "failed": failed,
        "best": str(best.folder) if best else None,
        "not_told_apart": len(alike),
        "exit_code": 1 if failed else 0,
    }


def start_process(words: list[str]) -> tuple[int, str]:
    """``rankalign train`` in a process of its own, whose messages pass on to stderr.

    Ctrl-C reaches it by itself; SIGTERM is handed on, and comes if this process is killed. Each way it writes a
    checkpoint before it ends.
    """
    command = [sys.executable, "-m", "rankalign", "train", *words, "--json"]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, text=True, errors="replace", preexec_fn=stop_with_parent, **streams)
    told: list[int] = []  # a signal that comes when the run is just ending stops the sweep all the same

    def hand_on(number: int, frame: Any) -> None:
        told.append(number)
        child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    lines: deque[str] = deque(maxlen=LAST_WORDS)
    try:
        while not _read_to_end(child, lines):
            told.append(signal.SIGINT)  # the run has it, too: it ends when its checkpoint is written
    finally:
        signal.signal(signal.SIGTERM, before)
    code = child.wait()
    return (130 if told else code), _why(lines, code)


def _read_to_end(child: subprocess.Popen[str], lines: deque[str]) -> bool:
    """Pass on what a process says until it has ended; False where Ctrl-C came in between."""
    assert child.stderr is not None
    try:
        for line in child.stderr:
            lines.append(line.rstrip("\n"))
            print(line, end="", file=sys.stderr, flush=True)
        child.wait()
    except KeyboardInterrupt:
        return False
    return True


def _why(lines: Iterable[str], code: int) -> str:
    """The reason that a run gave for its end."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (": out of memory?" if code == -signal.SIGKILL else "")
    said = [line.removeprefix("rankalign: ") for line in lines if line.startswith("rankalign: ")]
    return said[-1] if said else next((line for line in reversed(list(lines)) if line.strip()), "")
