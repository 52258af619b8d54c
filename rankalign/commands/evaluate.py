"""Measure answers: perplexity under a model, reward by a scorer, text statistics, agreement of judges, numerics."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankalign.commands import add_reading_arguments, intake_of, say_left_out
from rankalign.data.convert import Intake
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, choose_judge, judges
from rankalign.data.spool import Spool, View
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, cut_warning, only_policy, policies
from rankalign.evaluation.tables import Table, from_dict, from_result, render
from rankalign.registry import did_you_mean

EXAMPLE = "rankalign eval reward runs/demo/after.jsonl --judge vader"
KINDS = ("perplexity", "reward", "lexical", "variety", "agreement", "numerics", "kl", "subsets", "ledger", "suite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which file."""
    parser.add_argument("kind", choices=KINDS, help="what to measure")
    parser.add_argument(
        "file", help="records with responses, in any known format; ledger: a run's folder; suite: its name"
    )
    parser.add_argument("--files", nargs="+", default=(), help="suite: its judgements, scores or answers")
    parser.add_argument("--questions", default="", help="suite: its data set, to name what is missing or unknown")
    parser.add_argument("--answers", nargs="+", default=(), help="suite arena-hard: files of answers, to control style")
    parser.add_argument("--baseline", default="", help="suite: the system that others are set against")
    parser.add_argument("--format", default="auto", help="format of the file: auto or a name of `rankalign ls formats`")
    parser.add_argument("--judge", default="", help="whose scores; needed where several judges scored")
    parser.add_argument("--truth", default="", help="agreement, subsets: the judge whose order counts as right")
    parser.add_argument("--raters", nargs="+", help="agreement: two or more judges or annotators, all alike")
    parser.add_argument(
        "--function",
        help="reward, subsets, suite rewardbench2: score now with this function (module:name or file.py:name)",
    )
    parser.add_argument("--reward_model", help="reward, subsets, suite: score now with this model")
    parser.add_argument("--stop", nargs="*", default=(), help="reward: strings that end an answer before it is scored")
    parser.add_argument("--best_of", type=int, nargs="*", help="reward: expected best of so many draws")
    parser.add_argument("--model", default="default", help="perplexity, numerics, kl: the model that reads the answers")
    parser.add_argument("--start", default="default", help="kl: the model that --model, whose answers these are, was")
    parser.add_argument("--template", default="auto", help="perplexity: prompt format")
    parser.add_argument("--alone", action="store_true", help="perplexity: of the answers without their prompts")
    parser.add_argument(
        "--allow_special_in_text", action="store_true", help="perplexity: control tokens that texts spell are no text"
    )
    parser.add_argument("--compat", default="", help="perplexity: 'rrhf' for the arithmetic of RRHF's tables")
    parser.add_argument("--modes", nargs="+", default=(), help="numerics: precisions to compare with float64")
    parser.add_argument("--max_prompts", type=int, default=32, help="numerics: prompts to read, 0 for all")
    parser.add_argument("--reference", default="", help="lexical: policy whose answers are references for ROUGE")
    parser.add_argument("--policy", default="", help="only the answers of this policy")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One evaluation as ``{"metrics", "n", "ci95"}``."""
    if args.kind == "suite":
        return _suite(args)
    for flag in ("files", "questions", "answers", "baseline"):
        if getattr(args, flag):
            raise InputError(f"--{flag} goes with `rankalign eval suite NAME`")
    if args.kind == "ledger":
        return _ledger(args)
    intake = intake_of(args)
    sets = _read(args, intake)
    say_left_out(intake)
    if args.policy:
        sets = _only(args, sets)
    result = _MEASURE[args.kind](args, sets)
    warnings = [said] if (said := cut_warning(sets)) else []
    rows = {"unstable": result.rows} if args.kind == "numerics" else {}
    return {
        "kind": args.kind,
        "file": Path(args.file).name,
        **result.as_dict(),
        **rows,
        "skipped": len(intake.errors),
        "warnings": warnings,
    }


def _suite(args: argparse.Namespace) -> dict[str, Any]:
    from rankalign.evaluation.suites import Asked, evaluate_suite

    asked = Asked(args.files, args.questions, args.answers, args.baseline, args.judge, _scorer(args), args.seed)
    found = evaluate_suite(args.file, asked)
    ci95 = {name: list(bounds) for name, bounds in found.ci95.items()}
    shown = [dataclasses.asdict(table) for table in found.tables]
    files = [Path(file).name for file in args.files]
    facts = {"metrics": found.metrics, "n": found.n, "ci95": ci95, "remarks": found.remarks}
    return {"kind": "suite", "suite": args.file, "files": files, **facts, "tables": shown}


def _ledger(args: argparse.Namespace) -> dict[str, Any]:
    from rankalign.evaluation.report.hard_examples import read_ledger

    found = read_ledger(args.file)
    return {"kind": "ledger", **found.as_dict(), "tables": [dataclasses.asdict(table) for table in found.tables()]}


def _read(args: argparse.Namespace, intake: Intake) -> Sequence[CandidateSet]:
    if args.kind == "subsets":
        from rankalign.evaluation.raters.reward_bench import read_subsets

        return read_subsets(args.file, args.format, intake)
    return Spool(load(args.file, args.format, intake))


def _only(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> Sequence[CandidateSet]:
    """The answers of ``--policy``, and beside them those that they are set against."""
    own = only_policy(sets, args.policy)
    if not own:
        raise InputError(f"{args.file}: no answer by policy {args.policy!r}{did_you_mean(args.policy, policies(sets))}")
    if args.kind != "lexical" or not args.reference:
        return own
    wanted = (args.policy, args.reference)

    def kept(record: CandidateSet) -> CandidateSet:
        return dataclasses.replace(record, responses=[each for each in record.responses if each.policy in wanted])

    return View(sets, own.at, kept)


def _perplexity(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.texts.perplexity import evaluate_perplexity
    from rankalign.models import load as models

    model, tokenizer = models.load_policy(args.model, dtype="float32"), models.load_tokenizer(args.model)
    asked = (not args.alone, args.template, args.compat, args.seed, args.allow_special_in_text)
    return evaluate_perplexity(model, tokenizer, sets, *asked)


def _reward(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.raters.reward import evaluate_best_of_n, evaluate_reward, graded_each

    scorer = _scorer(args)
    if args.best_of is None:
        return evaluate_reward(sets, scorer or _only_judge(args, sets), args.stop, args.seed)
    graded = Spool(graded_each(sets, scorer, args.stop)) if scorer else sets
    return evaluate_best_of_n(graded, scorer.name if scorer else _only_judge(args, sets), args.best_of, args.seed)


def _scorer(args: argparse.Namespace) -> Any:
    from rankalign.config import ScorerConfig
    from rankalign.stages.generation import build_scorer

    if args.function:
        return build_scorer(ScorerConfig(args.judge or "function", "function", {"function": args.function}))
    if args.reward_model:
        return build_scorer(ScorerConfig(args.judge or "reward_model", "reward_model", {"model": args.reward_model}))
    return None


def _only_judge(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> str:
    return choose_judge(sets, args.judge)


def _lexical(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.texts.lexical import evaluate_lexical

    return evaluate_lexical(sets, reference=args.reference, seed=args.seed)


def _variety(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.texts.variety import evaluate_variety

    return evaluate_variety(sets, args.seed)


def _agreement(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.raters.accuracy import evaluate_agreement
    from rankalign.evaluation.raters.concordance import evaluate_raters

    if args.raters:
        return evaluate_raters(sets, args.raters, args.seed)
    if not args.judge or not args.truth:
        found = ", ".join(judges(sets)) or "none"
        raise InputError(f"name two judges with --judge and --truth, or raters with --raters (in the data: {found})")
    from rankalign.scorers import JUDGE, summary

    result = evaluate_agreement(sets, args.judge, args.truth, args.seed)
    told = summary(sets).get(JUDGE + args.judge, {})  # of a judge that explains itself
    result.metrics |= {name: told[name] for name in ("parse_rate", "consistency", "repeatability") if name in told}
    return result


def _kl(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.texts.divergence import evaluate_divergence
    from rankalign.models import load as models

    policy, start = (models.load_policy(name, dtype="float32") for name in (args.model, args.start))
    return evaluate_divergence(policy, start, models.load_tokenizer(args.model), sets, args.template, args.seed)


def _subsets(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.raters.reward import grade
    from rankalign.evaluation.raters.reward_bench import TRUTH, evaluate_subsets

    scorer = _scorer(args)
    if not scorer and not args.judge:
        raise InputError("name who is examined: --reward_model, --function, or --judge for scores in the file")
    graded = grade(sets, scorer) if scorer else sets
    return evaluate_subsets(graded, scorer.name if scorer else args.judge, args.truth or TRUTH, args.seed)


def _numerics(args: argparse.Namespace, sets: Sequence[CandidateSet]) -> EvalResult:
    from rankalign.evaluation.texts.numerics import DEFAULT_MODES, evaluate_numerics
    from rankalign.models import load as models

    model, tokenizer = models.load_policy(args.model, dtype="float32"), models.load_tokenizer(args.model)
    sets = sets[: args.max_prompts] if args.max_prompts else sets
    return evaluate_numerics(model, tokenizer, sets, args.modes or DEFAULT_MODES, args.template)


_MEASURE = {
    "perplexity": _perplexity,
    "reward": _reward,
    "lexical": _lexical,
    "variety": _variety,
    "agreement": _agreement,
    "numerics": _numerics,
    "kl": _kl,
    "subsets": _subsets,
}


def tables(result: dict[str, Any]) -> list[Table]:
    """The table of the metrics, or those of a ledger."""
    if "tables" in result:
        return [from_dict(table) for table in result["tables"]]
    ci95 = {name: (low, high) for name, (low, high) in result["ci95"].items()}
    return [from_result(f"{result['kind']} of {result['file']}", EvalResult(result["metrics"], result["n"], ci95))]


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for table in tables(result):
        render(table)
    for remark in result.get("remarks", ()):
        print(f"remark: {remark}")
    for warning in result.get("warnings", ()):
        print(f"look at: {warning}")
