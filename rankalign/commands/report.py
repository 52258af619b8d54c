"""One self-contained HTML page of a run, from what lies in its folder; of several runs, one page side by side."""

from __future__ import annotations

import argparse

EXAMPLE = "rankalign report runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder; several are compared on one page")
    parser.add_argument(
        "--output", default="", help="the page (report.html in the run, runs.html beside several)", metavar="FILE"
    )


def run(args: argparse.Namespace) -> dict[str, str]:
    """Write the page."""
    if len(args.folders) > 1:
        from rankalign.evaluation.report.several import write_comparison

        return {"report": str(write_comparison(args.folders, args.output))}
    from rankalign.evaluation.report.page import write_report

    return {"report": str(write_report(args.folders[0], args.output))}


def show(result: dict[str, str]) -> None:
    """Print where it is."""
    print(result["report"])
