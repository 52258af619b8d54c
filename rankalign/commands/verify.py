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
    """Check every hash of the manifest, and of those of the stages beneath it; exit code 1 where one differs.

    ``changed`` names what is altered or gone; ``missing`` names inputs that a moved folder left behind, which are no
    fault of it.
    """
    own = manifest.read(args.run)
    if own is None:
        raise InputError(f"{args.run}: no manifest ({manifest.path_for(args.run)}): the run is not finished")
    found = [(manifest.path_for(args.run), own), *manifest.beneath(args.run)]
    files = {entry.path for path, content in found for entry in manifest.entries(path, content)}
    changed = {entry["path"]: entry for path, content in found for entry in manifest.changed_files(path, content)}
    missing = sorted({name for path, content in found for name in manifest.missing_files(path, content)})
    return {
        "files": len(files),
        "manifests": len(found),
        "changed": list(changed.values()),
        "missing": missing,
        "exit_code": int(bool(changed)),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """What changed, a row a file."""
    names = ["path", "role", "reason"]
    note = f"{result['files']} files, {len(result['changed'])} changed"
    return [Table("Changed", names, [[entry[name] for name in names] for entry in result["changed"]], note)]


def show(result: dict[str, Any]) -> None:
    """Name what changed."""
    for entry in result["changed"]:
        print(f"changed: {entry['path']} ({entry['role']}: {entry['reason']})")
    for path in result["missing"]:
        print(f"not checked: {path} (input: the folder was moved, and this is not where it was)")
    left = f", {len(result['missing'])} not checked" if result["missing"] else ""
    print(f"{result['files']} files of {result['manifests']} manifests, {len(result['changed'])} changed{left}")
