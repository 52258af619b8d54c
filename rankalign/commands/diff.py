"""What differs between two runs: settings, inputs, outputs, versions, counts, metrics."""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import Table
from rankalign.storage import manifest
from rankalign.storage.journal import differences

EXAMPLE = "rankalign diff runs/demo runs/demo-seed1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two runs."""
    parser.add_argument("a", help="a run's folder, or an output file with a manifest beside it")
    parser.add_argument("b", help="the other")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """``{"differences": [...]}``, each ``path: a -> b``."""
    found = []
    for name in (args.a, args.b):
        content = manifest.read(name)
        if content is None:
            raise InputError(f"{name}: no manifest ({manifest.path_for(name)})")
        found.append(content)
    return {"differences": differences(found[0], found[1])}


def tables(result: dict[str, Any]) -> list[Table]:
    """A row a difference."""
    rows = [list(line.partition(": ")[::2]) for line in result["differences"]]
    return [Table("Differences", ["field", "first -> second"], rows)]


def show(result: dict[str, Any]) -> None:
    """Print a line a difference."""
    print("\n".join(result["differences"]) or "no differences")
