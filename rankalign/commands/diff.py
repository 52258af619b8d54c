"""What differs between two runs: settings, versions, counts, metrics, and the files themselves as they are now."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import Table
from rankalign.storage import manifest
from rankalign.storage.journal import differences

EXAMPLE = "rankalign diff runs/demo runs/demo-seed1"
GONE = "is gone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two runs."""
    parser.add_argument("a", help="a run's folder, or an output file with a manifest beside it")
    parser.add_argument("b", help="the other")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """``{"differences": [...], "changed": [...]}``: ``path: a -> b`` each, and files that are no more as they were.

    Of a folder, the stages beneath it are compared as well, under ``stages``.
    """
    a, b = _read(args.a), _read(args.b)
    changed = [line for name in (args.a, args.b) for line in _changed(name)]
    return {"differences": differences(a, b), "changed": changed}


def _read(name: str) -> dict[str, Any]:
    own = manifest.read(name)
    if own is None:
        raise InputError(f"{name}: no manifest ({manifest.path_for(name)})")
    beneath = {
        path.relative_to(name).as_posix(): _with_files(path, content) for path, content in manifest.beneath(name)
    }
    return _with_files(manifest.path_for(name), own) | ({"stages": beneath} if beneath else {})


def _with_files(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The manifest with what its files hold now; an input goes by its file's name, wherever a run lies."""
    entries = manifest.entries(path, content)
    short = Counter(entry.path.name for entry in entries if entry.role == "input")
    files: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}}
    for entry in entries:
        if entry.role == "input":
            name = entry.path.name if short[entry.path.name] == 1 else entry.name
        else:
            name = entry.path.relative_to(path.parent).as_posix()
        files[entry.role + "s"][name] = entry.now() or GONE
    return {key: value for key, value in content.items() if key != manifest.RELATIVE} | files


def _changed(name: str) -> list[str]:
    content = manifest.read(name) or {}
    found = [(manifest.path_for(name), content), *manifest.beneath(name)]
    entries = [entry for path, inner in found for entry in manifest.changed_files(path, inner)]
    return [f"{entry['path']} {entry['reason']} since the run" for entry in entries]


def tables(result: dict[str, Any]) -> list[Table]:
    """A row a difference."""
    rows = [list(line.partition(": ")[::2]) for line in result["differences"]]
    return [Table("Differences", ["field", "first -> second"], rows)]


def show(result: dict[str, Any]) -> None:
    """Print a line a difference."""
    print("\n".join(result["differences"]) or "no differences")
    for line in result["changed"]:
        print(f"note: {line}")
