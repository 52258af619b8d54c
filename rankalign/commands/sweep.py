"""Train once for each combination of settings that have several values, and say which run is best.

Takes every setting of `rankalign train`; one with commas has several values, and so has a flag that is given more than
once. Tokens and reference log-probabilities are shared. Killed or interrupted, the same command goes on: finished runs
are not repeated, and a changed setting is another run. A run that fails is counted, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import Table, render

EXAMPLE = "rankalign sweep config.yaml --data scored.jsonl --loss dpo --learning_rate 5e-7,1e-6 --beta 0.05,0.1"
TAKES_MORE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our own flags; everything else is a setting of training."""
    parser.add_argument("--config", help="YAML file with the settings that all runs share; may stand first")
    parser.add_argument("--list", default="", metavar="F", help="runs one by one: a YAML list, or JSON Lines")
    parser.add_argument("--output_dir", default="runs/sweep", help="folder of the sweep (runs/sweep)")
    parser.add_argument(
        "--metric",
        default="",
        metavar="NAME[:max|:min]",
        help="what is best, as in log.jsonl (of measurements: ranking_accuracy)",
    )
    parser.add_argument("--dry_run", action="store_true", help="check and list the runs, and train none")
    parser.add_argument("--num_processes", type=int, default=0, metavar="N", help="processes of each run")
    parser.add_argument("--launch", default="", help="how they share the work: ddp, fsdp2, zero2 or zero3")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan and train; see :mod:`rankalign.recipes.sweep`."""
    from rankalign.evaluation.export import write_tables
    from rankalign.evaluation.report.several import write_comparison
    from rankalign.recipes import sweep
    from rankalign.recipes.launch import SCRIPT
    from rankalign.recipes.sweep_metric import metric_of

    if args.launch.partition(":")[0] == SCRIPT:
        raise InputError(f"--launch {SCRIPT} is for one run: put `rankalign sweep` itself into a script")
    launch = ["--num_processes", str(args.num_processes)] * bool(args.num_processes)
    launch += ["--launch", args.launch] * bool(args.launch)
    output = Path(args.output_dir)
    runs = sweep.plan(args.config, args.rest, output, args.list, launch)
    metric = metric_of(args.metric, [run.config for run in runs])
    if args.dry_run:
        return sweep.summary(runs, metric, output)
    done = sweep.run_all(runs, metric, output, sweep.start_process, launch)
    for name in ("sweep.md", "sweep.csv"):
        write_tables(output / name, tables(done))
    finished = [run.folder for run in runs if run.status == "finished"]
    if len(finished) > 1:
        try:
            write_comparison(finished, output / "sweep.html")
        except InputError as error:  # the page wants packages that training does without
            print(f"no page: {error}", file=sys.stderr)
    return done


def tables(result: dict[str, Any]) -> list[Table]:
    """A row a run, the best first among those that have the metric."""
    metric, rows = result["metric"], result["runs"]
    settings = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    if metric:
        sign = -1 if result["direction"] == "max" else 1
        rows = sorted(rows, key=lambda row: (row.get(metric) is None, sign * (row.get(metric) or 0)))
    cells = [
        [
            row["run"],
            *(_text(row["settings"].get(name)) for name in settings),
            *([row.get(metric)] if metric else []),
            *(row.get(name) for name in ("steps", "seconds")),
            row.get("reason") or row["status"],
        ]
        for row in rows
    ]
    columns = ["run", *settings, *([metric] if metric else []), "steps", "seconds", "status"]
    return [Table("Sweep", columns, cells, _note(result))]


def _text(value: Any) -> str:
    """A setting as it was given: digits that were not typed would be a claim."""
    return "" if value is None else str(value)


def _note(result: dict[str, Any]) -> str:
    said = f"{result['finished']} of {len(result['runs'])} runs finished, {result['failed']} failed"
    if not result["metric"]:
        return f"{said}; nothing is measured and no --metric named, so none is called best"
    way = "higher" if result["direction"] == "max" else "lower"
    if not result["best"]:
        return f"{said}; best by {result['metric']}, {way} is better: none has it yet"
    alike = result["not_told_apart"]
    also = f"; {alike} others are not told apart from it by this measurement" if alike else ""
    return f"{said}; best by {result['metric']}, {way} is better: {result['best']}{also}"


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    render(tables(result)[0])
