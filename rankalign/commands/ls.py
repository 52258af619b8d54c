"""List what there is to choose from: losses, losses of reward models, engines, scorers, formats, suites, templates."""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.evaluation.tables import Table

EXAMPLE = "rankalign ls losses"
KINDS = ("losses", "reward-losses", "engines", "scorers", "formats", "suites", "templates")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The kind to list."""
    parser.add_argument("kind", choices=KINDS, help="what to list")


def run(args: argparse.Namespace) -> list[dict[str, str]]:
    """``[{"name", "summary"}]``."""
    return [{"name": name, "summary": entry.summary} for name, entry in _entries(args.kind).items()]


def _entries(kind: str) -> dict[str, Any]:
    if kind == "losses":
        from rankalign.losses import LOSSES

        return dict(LOSSES)
    if kind == "reward-losses":
        from rankalign.losses.reward import REWARD_LOSSES

        return dict(REWARD_LOSSES)
    if kind == "engines":
        from rankalign.engines import ENGINES

        return dict(ENGINES)
    if kind == "scorers":
        from rankalign.scorers import SCORERS

        return dict(SCORERS)
    if kind == "formats":
        from rankalign.data.formats import FORMATS
        from rankalign.data.formats.named import DATASETS

        return {**FORMATS, **DATASETS}
    if kind == "suites":
        from rankalign.evaluation.suites import SUITES

        return dict(SUITES)
    from rankalign.data.templates import CHAT, TEMPLATES

    return {"chat": CHAT, **TEMPLATES}


def tables(result: list[dict[str, str]]) -> list[Table]:
    """A row a name."""
    return [Table("Names", ["name", "summary"], [[row["name"], row["summary"]] for row in result])]


def show(result: list[dict[str, str]]) -> None:
    """Print a line a name."""
    width = max(len(row["name"]) for row in result)
    for row in result:
        print(f"{row['name']:<{width}}  {row['summary']}")
