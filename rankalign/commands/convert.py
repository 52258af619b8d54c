"""Convert between our records and every other tool's format; what the target cannot hold is counted."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankalign.convert import convert

EXAMPLE = "rankalign convert rrhf.jsonl records.jsonl --from rrhf --to rankalign"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target, formats."""
    parser.add_argument("source", help="file to read")
    parser.add_argument("target", help="file to write")
    parser.add_argument("--from", dest="from_format", required=True, help="a name of `rankalign ls formats`")
    parser.add_argument("--to", dest="to_format", required=True, help="a name of `rankalign ls formats`")
    parser.add_argument("--skip-invalid", action="store_true", help="leave bad lines out and report them")
    parser.add_argument("--extra", action="append", default=[], help="one more source, for formats in several files")
    parser.add_argument("--judge", default="", help="whose scores rank, where several judges scored")
    parser.add_argument("--pairs", choices=("all", "best-worst"), default="all", help="pairs made of a ranked list")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert; see :func:`rankalign.convert.convert`."""
    formats = (args.from_format, args.to_format)
    return convert(args.source, args.target, *formats, args.skip_invalid, args.judge, args.pairs, args.extra)


def show(result: dict[str, Any]) -> None:
    """Print counts, and each bad line on stderr."""
    for error in result["errors"]:
        print(f"skipped {error['file']}:{error['line']}: {error['field']}: {error['reason']}", file=sys.stderr)
    lost = "".join(f"; left out: {count} {reason}" for reason, count in result["lost"].items())
    print(f"read {result['read']}, wrote {result['written']}, skipped {result['skipped']}{lost}")
