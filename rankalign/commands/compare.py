"""Two systems on the same prompts: sums of scores, wins, ties and losses, with intervals over prompts.

Both files hold answers to the same prompts, in any known format. Scores by --judge are taken from the files; --function
or --reward_model scores them now. Where there are neither, VADER sentiment judges, and that is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from rankalign.config import ScorerConfig
from rankalign.data import load
from rankalign.errors import InputError
from rankalign.evaluation.hack import find_hacks
from rankalign.evaluation.pairwise import compare_by_score
from rankalign.evaluation.recompute import recompute
from rankalign.evaluation.reward import grade
from rankalign.evaluation.tables import from_dict, render
from rankalign.generation import build_scorer
from rankalign.records import CandidateSet, choose_judge, dumps, judges

FALLBACK = "rankalign.scorers.builtin:vader"
EXAMPLE = "rankalign compare runs/demo/before.jsonl runs/demo/after.jsonl --judge vader"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two files and who judges."""
    parser.add_argument("a", nargs="?", help="records of the first system")
    parser.add_argument("b", nargs="?", help="records of the second, same prompts")
    parser.add_argument("--reviews", help="recompute from reviews that exist (FastChat, QLoRA, AlpacaEval files)")
    parser.add_argument(
        "--parser", default="", choices=("", "tolerant", "strict", "stored"), help="of --reviews' texts"
    )
    parser.add_argument("--questions", default="", help="FastChat questions, for a table by category of --reviews")
    parser.add_argument("--baseline", default="", help="of --reviews: the system the others are measured against")
    parser.add_argument("--format", default="auto", help="of both files: auto or a name of `rankalign ls formats`")
    parser.add_argument("--judge", default="", help="whose scores; needed where several judges scored")
    parser.add_argument("--function", help="score now with this function (module:name or file.py:name)")
    parser.add_argument("--reward_model", help="score now with this model")
    parser.add_argument("--names", nargs=2, default=("", ""), help="what to call the two")
    parser.add_argument("--tie_delta", type=float, default=0.0, help="scores this close are a tie")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare; see :func:`rankalign.evaluation.pairwise.compare_by_score` and ``evaluation.recompute``."""
    if args.reviews:
        found = recompute(args.reviews, args.parser, args.baseline, args.questions, seed=args.seed)
        return {**found.as_dict(), "flags": [], "table": dataclasses.asdict(found.table())}
    if not (args.a and args.b):
        raise InputError("name two files, or one with --reviews")
    a, b = align(list(load(args.a, args.format)), list(load(args.b, args.format)))
    a, b, judge = _judged(args, a, b)
    names = (args.names[0] or Path(args.a).stem, args.names[1] or Path(args.b).stem)
    comparison = compare_by_score(a, b, judge, names, args.tie_delta, args.seed)
    flags = [{"name": flag.name, "message": flag.message} for flag in find_hacks(a, b, judge, args.seed)]
    return {**comparison.as_dict(), "judge": judge, "flags": flags, "table": dataclasses.asdict(comparison.table())}


def align(a: list[CandidateSet], b: list[CandidateSet]) -> tuple[list[CandidateSet], list[CandidateSet]]:
    """Files whose format has no ids got them from their own names, so no id is in both; their prompts match them."""
    if {record.id for record in a} & {record.id for record in b}:
        return a, b
    return [dataclasses.replace(record, id=dumps(record.prompt)) for record in a], [
        dataclasses.replace(record, id=dumps(record.prompt)) for record in b
    ]


def _judged(
    args: argparse.Namespace, a: list[CandidateSet], b: list[CandidateSet]
) -> tuple[list[CandidateSet], list[CandidateSet], str]:
    """Both files with scores, and whose they are."""
    if args.function and args.reward_model:
        raise InputError("--function and --reward_model are two judges; name one")
    if not (args.function or args.reward_model or args.judge or judges([*a, *b])):
        print(f"no answer has a score: judging by {FALLBACK}; name a judge of your own", file=sys.stderr)
        args.function = FALLBACK
    if args.function or args.reward_model:
        kind, option = ("function", "function") if args.function else ("reward_model", "model")
        name = args.judge or kind
        scorer = build_scorer(ScorerConfig(name, kind, {option: args.function or args.reward_model}))
        return grade(a, scorer), grade(b, scorer), name
    return a, b, choose_judge([*a, *b], args.judge)


def show(result: dict[str, Any]) -> None:
    """Print the table, and what looks like cheating."""
    render(from_dict(result["table"]))
    for flag in result["flags"]:
        print(f"look at: {flag['message']}")
