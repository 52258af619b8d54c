"""Has anything that a run read or wrote changed since its manifest was written?"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import Table
from rankalign.storage import manifest

EXAMPLE = "rankalign verify runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run", help="a run's folder, or an output file with a manifest beside it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check every hash of the manifest; exit code 1 where one differs."""
    found = manifest.read(args.run)
    if found is None:
        raise InputError(f"{args.run}: no manifest ({manifest.path_for(args.run)}): the run is not finished")
    changed = manifest.changed_files(found)
    return {"files": len(found["inputs"]) + len(found["outputs"]), "changed": changed, "exit_code": int(bool(changed))}


def tables(result: dict[str, Any]) -> list[Table]:
    """What changed, a row a file."""
    names = ["path", "role", "reason"]
    note = f"{result['files']} files, {len(result['changed'])} changed"
    return [Table("Changed", names, [[entry[name] for name in names] for entry in result["changed"]], note)]


def show(result: dict[str, Any]) -> None:
    """Name what changed."""
    for entry in result["changed"]:
        print(f"changed: {entry['path']} ({entry['role']}: {entry['reason']})")
    print(f"{result['files']} files, {len(result['changed'])} changed")
