"""Convert between our records and every other tool's format; what the target cannot hold is counted."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankalign.data.convert import convert
from rankalign.data.mixing import Mixture

EXAMPLE = "rankalign convert rrhf.jsonl records.jsonl --from rrhf --to rankalign"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sources, target, formats, mixture."""
    parser.add_argument("source", nargs="+", help="file or `datasets` folder to read; several become one")
    parser.add_argument(
        "target", help="file to write: .jsonl[.gz], .json, .parquet, .csv, .tsv, .xlsx; without an ending a folder"
    )
    parser.add_argument("--from", dest="from_format", default="auto", help="auto, or a name of `rankalign ls formats`")
    parser.add_argument("--to", dest="to_format", default="rankalign", help="a format of `rankalign ls formats`")
    parser.add_argument("--skip-invalid", action="store_true", help="leave bad lines out and report them")
    parser.add_argument("--extra", action="append", default=[], help="one more source, for formats in several files")
    parser.add_argument("--judge", default="", help="whose scores rank, where several judges scored")
    parser.add_argument("--pairs", choices=("all", "best-worst"), default="all", help="pairs made of a ranked list")
    parser.add_argument(
        "--columns",
        default="",
        metavar="KEY=COLUMN,...",
        help="of tables: prompt=question,response=answer,score=stars, or all answers in a row: prompt=q,responses=a|b,"
        "scores=sa|sb; also score:JUDGE=, policy=, judge=, id=, system=, meta=A|B",
    )
    parser.add_argument(
        "--ignore_columns", "--ignore-columns", default="", metavar="A,B", help="columns that may stay unread, or `all`"
    )
    parser.add_argument(
        "--dedup", type=float, default=0.0, metavar="SHARE",
        help="leave out prompts that share so much of their words with an earlier one, such as 0.8",
    )  # fmt: skip
    parser.add_argument(
        "--output_shards", type=int, default=0, metavar="N", help="write N files into a folder of the target's name"
    )
    mix = parser.add_argument_group("mixing")
    mix.add_argument("--weights", type=float, nargs="+", default=[], help="share of each source in the mixture")
    mix.add_argument("--limits", type=int, nargs="+", default=[], help="records of each source at the most")
    mix.add_argument("--test-size", type=float, default=0.0, help="share to hold out, as NAME.test.ENDING or a split")
    mix.add_argument("--seed", type=int, default=0, help="another seed makes another choice")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert; see :func:`rankalign.data.convert.convert`."""
    mixture = Mixture(tuple(args.weights), tuple(args.limits), args.test_size, args.seed)
    formats = (args.from_format, args.to_format)
    told = {"ignore_columns": args.ignore_columns, "columns": args.columns}
    return convert(
        args.source,
        args.target,
        *formats,
        args.skip_invalid,
        args.judge,
        args.pairs,
        args.extra,
        mixture,
        dedup=args.dedup,
        output_shards=args.output_shards,
        **told,
    )


def show(result: dict[str, Any]) -> None:
    """Print counts, and each bad line on stderr."""
    for error in result["errors"]:
        print(f"skipped {error['file']}:{error['line']}: {error['field']}: {error['reason']}", file=sys.stderr)
    lost = "".join(f"; left out: {count} {reason}" for reason, count in result["lost"].items())
    lost += "".join(f"; unread: {column} ({count})" for column, count in result.get("unread", {}).items())
    test = f" and {result['written_test']} held out" if "written_test" in result else ""
    print(f"read {result['read']}, wrote {result['written']}{test}, skipped {result['skipped']}{lost}")
