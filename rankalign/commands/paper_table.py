"""Run the RRHF paper's comparison again: every row with every seed, then one page with intervals and verdicts.

Each row of each seed is a unit of its own: a second run does only what is missing, and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from rankalign.config import load, resolve_near
from rankalign.errors import InputError
from rankalign.evaluation.tables import Table
from rankalign.recipes.paper.settings import TableConfig
from rankalign.registry import did_you_mean

EXAMPLE = "rankalign table --config train_scripts/configs/paper_table.yaml --output runs/paper_table --seeds 1 2 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign table``; they win over the settings file."""
    parser.add_argument("--config", required=True, help="YAML file with the rows and their settings")
    parser.add_argument("--output", help="folder of all units")
    parser.add_argument("--page", help="where to write the page (results.md in the output folder)")
    parser.add_argument("--model", help="the start model")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of sampling and training")
    parser.add_argument("--jobs", type=int, help="run so many seeds at a time, each on its share of the cores")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only")
    parser.add_argument("--overwrite", action="store_true", default=None, help="start over")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run; see :func:`rankalign.recipes.paper.table.run`."""
    from rankalign.recipes.paper.table import run as run_table

    flags = {name: getattr(args, name) for name in ("output", "page", "model", "seeds", "jobs", "overwrite")}
    config = load(TableConfig, args.config, **flags)
    prompts, heldout = (resolve_near(path, args.config) for path in (config.prompts, config.heldout))
    config = replace(config, prompts=prompts, heldout=heldout)
    return run_table(replace(config, rows=_some(config, args.rows)) if args.rows else config)


def _some(config: TableConfig, names: list[str]) -> list[Any]:
    known = [row.name for row in config.rows]
    for name in names:
        if name not in known:
            raise InputError(f"--rows: unknown row {name!r}{did_you_mean(name, known)}")
    return [row for row in config.rows if row.name in names]


def tables(result: dict[str, Any]) -> list[Table]:
    """The claims with their verdicts."""
    rows = [[claim["verdict"], claim["claim"]] for claim in result["claims"]]
    return [Table("Claims", ["verdict", "claim"], rows, f"page: {result['page']}")]


def show(result: dict[str, Any]) -> None:
    """Print the verdicts and where the page is."""
    for claim in result["claims"]:
        print(f"{claim['verdict']:<12} {claim['claim']}")
    told = f"{result['ran']} of {result['units']} units run in {result['seconds']:.0f} s, the others were finished"
    print(f"{told}\npage: {result['page']}", file=sys.stdout)
