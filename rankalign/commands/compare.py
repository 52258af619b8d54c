"""Two systems on the same prompts: sums of scores, wins, ties and losses, with intervals over prompts.

Both files hold answers to the same prompts, in any known format; FILE:POLICY takes one policy's. Scores by --judge are
taken from the files; --function or --reward_model scores them now, and --judge FILE.yaml asks a language model about
every prompt in both orders. Where there is none, VADER sentiment judges, and that is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankalign.config import ScorerConfig
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, choose_judge, judges
from rankalign.errors import InputError
from rankalign.evaluation import by_policy
from rankalign.evaluation.tables import Table, from_dict, render
from rankalign.storage.sources import is_there

if TYPE_CHECKING:
    from rankalign.evaluation.pairwise.alpaca_eval import Leaderboard
    from rankalign.evaluation.pairwise.scores import Comparison

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
    parser.add_argument("--judge", default="", help="whose scores, or the settings of a language model: FILE.yaml")
    parser.add_argument("--output", default="", help="folder of a language model's verdicts (runs/compare/A-B)")
    parser.add_argument("--max_prompts", type=int, default=0, help="compare on the first so many prompts; 0 on all")
    parser.add_argument("--function", help="score now with this function (module:name or file.py:name)")
    parser.add_argument("--reward_model", help="score now with this model")
    parser.add_argument("--names", nargs=2, default=("", ""), help="what to call the two")
    parser.add_argument("--tie_delta", type=float, default=0.0, help="scores this close are a tie")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare; see :func:`rankalign.evaluation.pairwise.scores.compare_by_score` and ``evaluation.recompute``."""
    from rankalign.evaluation.pairwise.scores import align, compare_by_score
    from rankalign.evaluation.pairwise.stored import recompute
    from rankalign.evaluation.report.hack import find_hacks

    if args.reviews:
        found = recompute(args.reviews, args.parser, args.baseline, args.questions, seed=args.seed)
        return {**found.as_dict(), **_ladder(found, args.seed), "flags": [], "table": dataclasses.asdict(found.table())}
    if not (args.a and args.b):
        raise InputError("name two files, or one with --reviews")
    a, b = align(_load(args.a, args.format), _load(args.b, args.format))
    if args.max_prompts:
        a = a[: args.max_prompts]
        wanted = {record.id for record in a}
        b = [record for record in b if record.id in wanted]
    names = (args.names[0] or _name(args.a), args.names[1] or _name(args.b))
    if args.judge.endswith((".yaml", ".yml")):
        return _live(args, a, b, names)
    a, b, judge = _judged(args, a, b)
    comparison = compare_by_score(a, b, judge, names, args.tie_delta, args.seed)
    flags = [{"name": flag.name, "message": flag.message} for flag in find_hacks(a, b, judge, args.seed)]
    return {**comparison.as_dict(), "judge": judge, "flags": flags, "table": dataclasses.asdict(comparison.table())}


def _load(spec: str, form: str) -> list[CandidateSet]:
    """Records of a file, or with ``FILE:POLICY`` one policy's answers in it."""
    path, colon, policy = spec.rpartition(":")
    if not colon or is_there(spec):
        return list(load(spec, form))
    found = by_policy(load(path, form))
    if policy not in found:
        raise InputError(f"{path}: no answer by policy {policy!r} (policies: {', '.join(found)})")
    return found[policy]


def _name(spec: str) -> str:
    """What to call a system: its policy, or its file without the ending."""
    return Path(spec).stem if is_there(spec) else spec.rpartition(":")[2]


def _live(
    args: argparse.Namespace, a: list[CandidateSet], b: list[CandidateSet], names: tuple[str, str]
) -> dict[str, Any]:
    from rankalign.evaluation.pairwise.live import judge_pairs, read_judge
    from rankalign.evaluation.pairwise.stored import read_categories

    folder = Path(args.output or f"runs/compare/{names[0]}-{names[1]}")
    categories = read_categories(args.questions) if args.questions else {}
    found = judge_pairs(read_judge(args.judge), a, b, names, categories, folder, args.seed)
    return {**found.as_dict(), "output": str(folder), "flags": [], "table": dataclasses.asdict(found.table())}


def _ladder(found: Comparison | Leaderboard, seed: int) -> dict[str, Any]:
    """Bradley-Terry strengths, where reviews compare more than two systems."""
    from rankalign.evaluation.pairwise.alpaca_eval import Leaderboard
    from rankalign.evaluation.pairwise.ladder import games_of_rows, rank_systems

    if isinstance(found, Leaderboard) or len(found.systems) < 2:
        return {}
    ladder = rank_systems(games_of_rows(found.rows), seed=seed)
    return {"bradley_terry": ladder.as_dict(), "ladder": dataclasses.asdict(ladder.table())}


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
        from rankalign.evaluation.raters.reward import grade
        from rankalign.stages.generation import build_scorer

        scorer = build_scorer(ScorerConfig(name, kind, {option: args.function or args.reward_model}))
        return grade(a, scorer), grade(b, scorer), name
    return a, b, choose_judge([*a, *b], args.judge)


def tables(result: dict[str, Any]) -> list[Table]:
    """The comparison, and the order of more than two systems."""
    return [from_dict(result[name]) for name in ("table", "ladder") if name in result]


def show(result: dict[str, Any]) -> None:
    """Print the tables, what to know about them, and what looks like cheating."""
    for table in tables(result):
        render(table)
    if "calls" in result:
        read = f"{result['parsed']} of {result['calls']} verdicts could be read ({result['parse_rate']:.0%})"
        print(f"judge {result['judge']}: {read}; {result['identical']} prompts with equal answers were not judged")
    for remark in result.get("remarks", ()):
        print(f"remark: {remark}")
    for one in result.get("disagreements", ()):
        where = f"question {one['question']}, {one['first']} against {one['second']}"
        print(f"remark: {where}: the stored score is {one['stored']}, the text says {one['text']}")
    for flag in result["flags"]:
        print(f"look at: {flag['message']}")
