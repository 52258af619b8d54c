"""Lay out a project folder: settings, prompts, launchers and a script that runs the whole path; no clone is needed.

Files have the names that the documentation uses, so its commands run there as they stand.
"""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = "rankalign init my-project && cd my-project && bash run.sh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", metavar="DIR", help="a new or an empty folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Lay it out; see :func:`rankalign.recipes.project.lay_out`."""
    from rankalign.recipes.project import lay_out

    return {"folder": args.folder, "files": lay_out(args.folder)}


def show(result: dict[str, Any]) -> None:
    """Say what was made and what comes next."""
    folder = result["folder"]
    print(f"{folder}: {len(result['files'])} files; begin with {folder}/README.md, or: bash {folder}/run.sh")
