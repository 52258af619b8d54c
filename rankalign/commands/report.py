"""One self-contained HTML page of a run, from what lies in its folder."""

from __future__ import annotations

import argparse

EXAMPLE = "rankalign report runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("folder", help="a run's folder")


def run(args: argparse.Namespace) -> dict[str, str]:
    """Write ``report.html``."""
    from rankalign.evaluation.report.page import write_report

    return {"report": str(write_report(args.folder))}


def show(result: dict[str, str]) -> None:
    """Print where it is."""
    print(result["report"])
