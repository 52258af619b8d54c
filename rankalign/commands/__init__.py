"""One module a command: EXAMPLE, add_arguments(parser), run(args) -> result, show(result) for people.

One that shows tables also has tables(result), for --table. Printing help imports a command's module and no library:
what takes seconds to import is imported in run.
"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.evaluation.tables import Table


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the stages that several processes can share."""
    parser.add_argument(
        "--shard", metavar="I/N", help="do only part I of N, from 0; join with `rankalign merge OUTPUT`"
    )
    parser.add_argument("--runner", help="who computes: local (this process) or ray (Ray Data, here or on a cluster)")
    parser.add_argument("--workers", type=int, help="how many workers the runner ray starts")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what is there")


def scale_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_scale_arguments` read, as settings."""
    return {name: getattr(args, name) for name in ("shard", "runner", "workers", "overwrite")}


def show_facts(result: dict[str, Any]) -> None:
    """Print a flat result as aligned ``name  value`` lines."""
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {_text(value)}")


def fact_table(title: str, facts: dict[str, Any], note: str = "") -> Table:
    """A flat result as a table of two columns; an object in it is a row an entry, ``name.key``."""
    rows: list[list[Any]] = []
    for name, value in facts.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[f"{name}.{key}".removesuffix("."), entry] for key, entry in entries]
    return Table(title, ["name", "value"], rows, note)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)
