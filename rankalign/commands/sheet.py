"""Sheets for human raters: `make A B` writes a blinded CSV and its key, `read FILLED... --key KEY` evaluates them.

Raters write 1, 2 or tie in the last column (or nothing). Give each a copy named after the rater, and keep the key.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rankalign.commands import add_reading_arguments, intake_of, say_left_out
from rankalign.data.load import load
from rankalign.data.spool import Spool
from rankalign.errors import InputError
from rankalign.evaluation.tables import Table, from_dict, render

EXAMPLE = "rankalign sheet make runs/demo/before.jsonl runs/demo/after.jsonl --output raters.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which files."""
    parser.add_argument("action", choices=("make", "read"), help="write a sheet, or read filled ones")
    parser.add_argument("file", nargs="+", help="make: records of both systems; read: filled sheets, one a rater")
    parser.add_argument("--output", default="sheet.csv", help="make: the sheet; its key is written beside it")
    parser.add_argument("--key", help="read: the key of the sheet")
    parser.add_argument("--names", nargs=2, help="make: what to call the two systems; else the files' names")
    parser.add_argument("--format", default="auto", help="make: format of both files")
    add_reading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffles, or of the bootstrap")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write or read; see :mod:`rankalign.evaluation.pairwise.sheets`."""
    if args.action == "make":
        return _make(args)
    if not args.key:
        raise InputError("name the key of the sheet with --key")
    from rankalign.evaluation.pairwise.sheets import read_sheets

    ratings = read_sheets(args.file, args.key, args.seed)
    return {**ratings.as_dict(), "tables": [dataclasses.asdict(table) for table in ratings.tables()]}


def _make(args: argparse.Namespace) -> dict[str, Any]:
    if len(args.file) != 2:
        raise InputError("a sheet compares two files of records")
    from rankalign.evaluation.pairwise.scores import align
    from rankalign.evaluation.pairwise.sheets import write_sheet

    intake = intake_of(args)
    first, second = (Spool(load(path, args.format, intake)) for path in args.file)
    say_left_out(intake)
    a, b = align(first, second)
    stems = [Path(path).stem for path in args.file]
    names = tuple(args.names or (stems if stems[0] != stems[1] else ("a", "b")))
    return write_sheet(args.output, a, b, (names[0], names[1]), args.seed)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of read sheets."""
    return [from_dict(table) for table in result.get("tables", ())]


def show(result: dict[str, Any]) -> None:
    """Print where the sheet is, or the tables."""
    for table in tables(result):
        render(table)
    if "sheet" in result:
        print(f"{result['items']} items in {result['sheet']}; keep {result['key']} to yourself")
        if result["without_answer"]:
            print(f"{result['without_answer']} prompts left out: one side has no answer")
