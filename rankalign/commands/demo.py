"""The demo experiment, with or without a clone: a 135M model learns to answer a small mishap kindly.

Four policies and a person answer 80 prompts, the answers are scored, RRHF trains, and 64 held-out prompts say whether
it got better, in a table and on a page. The figures are those of `make demo`. Each step resumes.
"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.commands import run as whole_path

EXAMPLE = "rankalign demo --output runs/demo"
tables = whole_path.tables
show = whole_path.show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``rankalign run`` but for the settings file."""
    whole_path.add_flags(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run ``eval/configs/demo.yaml`` of the clone or of the installed package."""
    from rankalign.recipes.project import DEMO, root

    # Its own prompts, also in a project folder whose files of these names hold others: the figures are published.
    return whole_path.run_file(str(root() / DEMO), lambda path: str(root() / path), args)
