"""The whole path as one experiment: sample, score, train, answer held-out prompts before and after, compare, report.

Leaves result.json, report.html and every intermediate file in the output folder. Each step resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rankalign.config import load, resolve_near
from rankalign.evaluation.tables import Table, from_dict, render

EXAMPLE = "rankalign run --config eval/configs/demo.yaml --seed 1 --output runs/demo-seed1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign run``; they win over the settings file."""
    parser.add_argument("--config", required=True, help="YAML file of the experiment")
    add_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What an experiment's settings file may be overruled by."""
    parser.add_argument("--output", help="folder of the run")
    parser.add_argument("--model", help="the model to train, in the place of `default`")
    parser.add_argument("--seed", type=int, help="seed of sampling and training")
    parser.add_argument("--max_prompts", type=int, help="take the first so many training prompts")
    parser.add_argument("--overwrite", action="store_true", default=None, help="start over")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run; see :func:`rankalign.recipes.experiment.run`."""
    return run_file(args.config, lambda path: resolve_near(path, args.config), args)


def run_file(config_file: str, find: Callable[[str], str], args: argparse.Namespace) -> dict[str, Any]:
    """Run the experiment of a settings file; ``find`` says where a file of prompts that it names stands."""
    from rankalign.recipes.experiment import ExperimentConfig
    from rankalign.recipes.experiment import run as run_experiment

    flags = {name: getattr(args, name) for name in ("output", "model", "seed", "max_prompts", "overwrite")}
    config = load(ExperimentConfig, config_file, **flags)
    result = run_experiment(replace(config, prompts=find(config.prompts), heldout=find(config.heldout)))
    return {**result, "report": f"{config.output}/report.html"}


def tables(result: dict[str, Any]) -> list[Table]:
    """The table before and after."""
    return [from_dict(result["summary"])]


def show(result: dict[str, Any]) -> None:
    """Print the tables, what looks like cheating, and where the report is."""
    for table in tables(result):
        render(table)
    for flag in result["flags"]:
        print(f"look at: {flag['message']}")
    print(f"report: {result['report']}")
