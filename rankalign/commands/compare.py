"""Two systems on the same prompts: sums of scores, wins, ties and losses, with intervals over prompts.

Both files hold answers to the same prompts, in any known format; FILE:POLICY takes one policy's. Scores by --judge are
taken from the files; --function or --reward_model scores them now, and --judge FILE.yaml asks a language model about
every prompt in both orders. Where there is none, VADER sentiment judges, and that is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankalign.commands import READING, add_failure_arguments, add_reading_arguments, intake_of, say_left_out
from rankalign.config import ScorerConfig
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, choose_judge, judges
from rankalign.data.spool import Spool
from rankalign.errors import InputError
from rankalign.evaluation import cut_warning, only_policy, policies
from rankalign.evaluation.tables import Table, from_dict, render
from rankalign.registry import did_you_mean
from rankalign.storage.sources import is_there

if TYPE_CHECKING:
    from rankalign.evaluation.pairwise.alpaca_eval import Leaderboard
    from rankalign.evaluation.pairwise.missing import Missing
    from rankalign.evaluation.pairwise.scores import Comparison
    from rankalign.evaluation.pairwise.suspicions import Suspicion
    from rankalign.evaluation.report.hack import Flag

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
    parser.add_argument("--answers", nargs="+", default=(), help="FastChat answer files, for --reviews without systems")
    parser.add_argument("--baseline", default="", help="of --reviews: the system the others are measured against")
    parser.add_argument("--format", default="auto", help="of both files: auto or a name of `rankalign ls formats`")
    parser.add_argument("--judge", default="", help="whose scores, or the settings of a language model: FILE.yaml")
    parser.add_argument("--output", default="", help="folder of a language model's verdicts (runs/compare/A-B)")
    parser.add_argument(
        "--on-missing", "--on_missing", dest="on_missing", default="error", choices=("error", "intersect", "loss"),
        help="prompts that one side did not answer: refuse, leave out, or count as lost",
    )  # fmt: skip
    add_failure_arguments(parser)
    add_reading_arguments(parser)
    parser.add_argument("--max_prompts", type=int, default=0, help="compare on the first so many prompts; 0 on all")
    parser.add_argument("--function", help="score now with this function (module:name or file.py:name)")
    parser.add_argument("--reward_model", help="score now with this model")
    parser.add_argument("--names", nargs=2, default=("", ""), help="what to call the two")
    parser.add_argument("--tie_delta", type=float, default=0.0, help="scores this close are a tie")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare; see :func:`rankalign.evaluation.pairwise.scores.compare_by_score` and ``evaluation.recompute``."""
    from rankalign.evaluation.pairwise.missing import Missing, settle
    from rankalign.evaluation.pairwise.scores import align, compare_by_score, length_leads
    from rankalign.evaluation.pairwise.stored import recompute
    from rankalign.evaluation.pairwise.suspicions import length_suspicions
    from rankalign.evaluation.report.hack import compare_hacks

    _refuse_idle(args)
    if args.reviews:
        found = recompute(args.reviews, args.parser, args.baseline, args.questions, None, args.seed, args.answers)
        return {**found.as_dict(), **_ladder(found, args.seed), **_shown(found)}
    if not (args.a and args.b):
        raise InputError("name two files, or one with --reviews")
    a, b, missing = settle(*align(_load(args.a, args), _load(args.b, args)), args.on_missing)
    if args.max_prompts:
        a = a[: args.max_prompts]
        b = b[: args.max_prompts]  # `settle` has put them side by side
        missing = Missing()  # the first so many of those that both answered
    names = (args.names[0] or _name(args.a), args.names[1] or _name(args.b))
    if args.judge.endswith((".yaml", ".yml")):
        return _live(args, a, b, names, missing)
    a, b, judge = _judged(args, a, b)
    comparison = _settled(compare_by_score(a, b, judge, names, args.tie_delta, args.seed), args, missing)
    hacks = compare_hacks(a, b, judge, args.seed, names)
    flags: list[Flag | Suspicion] = [*hacks, *length_suspicions(length_leads(comparison, a, b)), *_cut(a, b, names)]
    return {**comparison.as_dict(), "judge": judge, **_shown(comparison, flags)}


def _refuse_idle(args: argparse.Namespace) -> None:
    """A flag has its effect or is refused."""
    known = (
        ("a", "judge", "function", "reward_model", "max_prompts", *READING)
        if args.reviews
        else ("parser", "baseline", "answers")
    )
    if idle := [name for name in known if getattr(args, name)]:
        what = "a file of answers" if idle[0] == "a" else f"--{idle[0]}"
        raise InputError(
            f"{what} has no effect {'with' if args.reviews else 'without'} --reviews; leave one of them out"
        )


def _settled(found: Comparison, args: argparse.Namespace, missing: Missing) -> Comparison:
    """The comparison with what was done about prompts that one side did not answer."""
    from rankalign.evaluation.pairwise.missing import forfeit

    if args.on_missing == "error":
        return found
    names = (found.systems[0].a, found.systems[0].b) if found.systems else ("the first", "the second")
    found.extra["missing"] = {"a": missing.first, "b": missing.second}
    found.extra["remarks"] = [*found.extra.get("remarks", ()), *missing.remarks(names, args.on_missing)]
    return forfeit(found, missing, args.seed) if args.on_missing == "loss" else found


def _cut(a: Sequence[CandidateSet], b: Sequence[CandidateSet], names: tuple[str, str]) -> list[Suspicion]:
    from rankalign.evaluation.pairwise.suspicions import Suspicion

    sides = zip((a, b), names, strict=True)
    return [Suspicion("cut", said) for side, name in sides if (said := cut_warning(side, f"{name}'s"))]


def _shown(found: Comparison | Leaderboard, flags: Sequence[Flag | Suspicion] = ()) -> dict[str, Any]:
    """Flags and tables of a comparison."""
    from rankalign.evaluation.pairwise.scores import Comparison
    from rankalign.evaluation.pairwise.suspicions import judge_suspicions
    from rankalign.evaluation.report.checks import judge_tables

    flags = [*judge_suspicions(found), *flags]
    judged = isinstance(found, Comparison) and "reviews" in found.extra
    # The remarks are said in lines of their own.
    tables = judge_tables({**found.as_dict(), "remarks": ()}) if judged else []
    return {
        "flags": [{"name": flag.name, "message": flag.message} for flag in flags],
        "table": dataclasses.asdict(found.table()),
        "tables": [dataclasses.asdict(table) for table in tables],
    }


def _load(spec: str, args: argparse.Namespace) -> Sequence[CandidateSet]:
    """Records of a file, or with ``FILE:POLICY`` one policy's answers in it."""
    path, colon, policy = spec.rpartition(":")
    whole, intake = not colon or is_there(spec), intake_of(args)
    sets = Spool(load(spec if whole else path, args.format, intake))
    say_left_out(intake)
    if whole:
        return sets
    if not (own := only_policy(sets, policy)):
        raise InputError(f"{path}: no answer by policy {policy!r}{did_you_mean(policy, policies(sets))}")
    return own


def _name(spec: str) -> str:
    """What to call a system: its policy, or its file without the ending."""
    return Path(spec).stem if is_there(spec) else spec.rpartition(":")[2]


def _live(
    args: argparse.Namespace,
    a: Sequence[CandidateSet],
    b: Sequence[CandidateSet],
    names: tuple[str, str],
    missing: Missing,
) -> dict[str, Any]:
    from rankalign.evaluation.pairwise.live import judge_pairs, read_judge
    from rankalign.evaluation.pairwise.scores import length_leads
    from rankalign.evaluation.pairwise.stored import read_categories
    from rankalign.evaluation.pairwise.suspicions import length_suspicions

    folder = Path(args.output or f"runs/compare/{names[0]}-{names[1]}")
    categories = read_categories(args.questions) if args.questions else {}
    failing = (args.on_error or "stop", bool(args.retry_failed))
    found = judge_pairs(read_judge(args.judge), a, b, names, categories, folder, args.seed, *failing)
    found = _settled(found, args, missing)
    flags = [*length_suspicions(length_leads(found, a, b)), *_cut(a, b, names)]
    return {**found.as_dict(), "output": str(folder), **_shown(found, flags)}


def _ladder(found: Comparison | Leaderboard, seed: int) -> dict[str, Any]:
    """Bradley-Terry strengths, where reviews compare more than two systems."""
    from rankalign.evaluation.pairwise.alpaca_eval import Leaderboard
    from rankalign.evaluation.pairwise.ladder import games_of_rows, rank_systems

    if isinstance(found, Leaderboard) or len(found.systems) < 2:
        return {}
    ladder = rank_systems(games_of_rows(found.rows), seed=seed)
    return {"bradley_terry": ladder.as_dict(), "ladder": dataclasses.asdict(ladder.table())}


def _judged(
    args: argparse.Namespace, a: Sequence[CandidateSet], b: Sequence[CandidateSet]
) -> tuple[Sequence[CandidateSet], Sequence[CandidateSet], str]:
    """Both files with scores, and whose they are."""
    if args.function and args.reward_model:
        raise InputError("--function and --reward_model are two judges; name one")
    if not (args.function or args.reward_model or args.judge or judges(chain(a, b))):
        print(f"no answer has a score: judging by {FALLBACK}; name a judge of your own", file=sys.stderr)
        args.function = FALLBACK
    if args.function or args.reward_model:
        kind, option = ("function", "function") if args.function else ("reward_model", "model")
        name = args.judge or kind
        from rankalign.evaluation.raters.reward import graded_each
        from rankalign.stages.generation import build_scorer

        scorer = build_scorer(ScorerConfig(name, kind, {option: args.function or args.reward_model}))
        return Spool(graded_each(a, scorer)), Spool(graded_each(b, scorer)), name
    return a, b, choose_judge(chain(a, b), args.judge)


def tables(result: dict[str, Any]) -> list[Table]:
    """The comparison, the order of more than two systems, what there is to know of the judge, sums by category."""
    first = [result[name] for name in ("table", "ladder") if name in result]
    return [from_dict(table) for table in [*first, *result.get("tables", ())]]


def show(result: dict[str, Any]) -> None:
    """Print the tables, what to know about them, and what looks like cheating."""
    for table in tables(result):
        render(table)
    if result.get("calls") == 0:
        print(f"judge {result['judge']}: all {result['identical']} prompts have equal answers: nothing was judged")
    elif "calls" in result:
        read = f"{result['parsed']} of {result['calls']} verdicts could be read ({result['parse_rate']:.0%})"
        print(f"judge {result['judge']}: {read}; {result['identical']} prompts with equal answers were not judged")
    for remark in result.get("remarks", ()):
        print(f"remark: {remark}")
    for one in result.get("disagreements", ()):
        where = f"question {one['question']}, {one['first']} against {one['second']}"
        print(f"remark: {where}: the stored score is {one['stored']}, the text says {one['text']}")
    for flag in result["flags"]:
        print(f"look at: {flag['message']}")
