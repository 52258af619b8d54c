"""One module a command: EXAMPLE, add_arguments(parser), run(args) -> result, show(result) for people.

One that shows tables also has tables(result), for --table. Printing help imports a command's module and no library:
what takes seconds to import is imported in run.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rankalign.errors import InputError
from rankalign.evaluation.tables import Table

if TYPE_CHECKING:
    from rankalign.data.convert import Intake

READING = ("skip_invalid", "ignore_columns")
SCALE = ("shard", "runner", "workers", "overwrite", "on_error", "retry_failed")


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the stages that several processes can share."""
    parser.add_argument(
        "--shard", metavar="I/N", help="do only part I of N, from 0; join with `rankalign merge OUTPUT`"
    )
    parser.add_argument(
        "--runner", help="who computes: local (this process), processes, or ray (Ray Data, here or on a cluster)"
    )
    parser.add_argument("--workers", type=int, help="how many workers the runner starts")
    parser.add_argument("--num_proc", type=int, help="so many processes: short for --runner processes --workers N")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what is there")
    add_failure_arguments(parser)


def add_failure_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about requests that a server refuses for good."""
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        help="where a server refuses a request: end the run, or go on",
    )
    parser.add_argument(
        "--retry_failed", action="store_true", default=None, help="ask again what --on_error skip left out"
    )


def scale_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_scale_arguments` read, as settings."""
    flags = {name: getattr(args, name) for name in SCALE}
    if args.num_proc is None:
        return flags
    if args.runner or args.workers or args.num_proc < 1:
        raise InputError("--num_proc takes a number from 1 on, and the place of --runner and --workers")
    return flags | ({"runner": "processes", "workers": args.num_proc} if args.num_proc > 1 else {})


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about rows that cannot be used and columns that nobody reads."""
    parser.add_argument(
        "--skip_invalid",
        "--skip-invalid",
        action="store_true",
        default=None,
        help="leave bad rows out, with their count",
    )
    parser.add_argument(
        "--ignore_columns", "--ignore-columns", metavar="A,B", help="columns that may stay unread, or `all`"
    )


def reading_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_reading_arguments` read, as settings."""
    return {name: getattr(args, name) for name in READING}


def intake_of(args: argparse.Namespace) -> Intake:
    """Takes the bad rows as :func:`add_reading_arguments` was told."""
    from rankalign.data.convert import Intake

    return Intake(bool(args.skip_invalid), args.ignore_columns or "")


def say_left_out(intake: Intake) -> None:
    """Say on stderr how many rows were left out, and why the first one was."""
    if intake.errors:
        print(f"{len(intake.errors)} bad records left out; the first: {intake.errors[0]}", file=sys.stderr)


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
