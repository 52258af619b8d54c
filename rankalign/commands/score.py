"""Scorers grade every response; the records come back with their scores added.

The settings file names the scorers; without one, --function or --reward_model names a single scorer. Resumable as
`rankalign sample` is.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rankalign.commands import (
    add_reading_arguments,
    add_scale_arguments,
    intake_of,
    reading_flags,
    scale_flags,
    show_facts,
)
from rankalign.config import ScoreConfig, load, resolve_near
from rankalign.errors import InputError

EXAMPLE = (
    "rankalign score --input runs/candidates.jsonl --output runs/scored.jsonl --name vader"
    " --function rankalign.scorers.builtin:vader"
)
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign score``; they win over the settings file."""
    parser.add_argument("--config", help="YAML file with input, output and scorers")
    parser.add_argument("--input", help="records with responses (JSON Lines)")
    parser.add_argument("--output", help="where the scored records go")
    parser.add_argument("--name", help="key under which the scores of --function or --reward_model are stored")
    parser.add_argument("--function", help="a Python function that scores: module:name or file.py:name")
    parser.add_argument("--reward_model", help="a sequence-classification model: folder or hub id")
    parser.add_argument(
        "--axis", help="which output of a --reward_model with several: its name, its index, mean, or a:0.65,b:0.8"
    )
    parser.add_argument("--combine", choices=("mean", "min", "rank"), help="make one score of those that are there")
    parser.add_argument("--judges", metavar="A=2,B", help="with --combine: which, and their weights; else all, alike")
    parser.add_argument(
        "--normalize", choices=("file", "prompt", "none"), help="with --combine: z-scores over what (else file)"
    )
    parser.add_argument(
        "--missing", choices=("null", "rest"), help="with --combine: no score where a judge gave none, or the rest's"
    )
    add_scale_arguments(parser)
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score; see :func:`rankalign.stages.generation.score`."""
    if args.combine:
        return _combined(args)
    for flag in ("judges", "normalize", "missing"):
        if getattr(args, flag):
            raise InputError(f"--{flag} goes with --combine")
    from rankalign.stages.generation import check_judges, score

    config = load(
        ScoreConfig,
        args.config,
        input=args.input,
        output=args.output,
        scorers=_single(args),
        **scale_flags(args),
        **reading_flags(args),
    )
    result = score(replace(config, input=resolve_near(config.input, args.config)))
    check_judges(result["output"])
    return result


def _combined(args: argparse.Namespace) -> dict[str, Any]:
    from rankalign.scorers.combine import Combination, parse_judges
    from rankalign.stages.combining import combine

    others = ("config", "function", "reward_model", "axis", "shard", "runner", "workers", "num_proc", "on_error")
    for flag in (*others, "retry_failed"):
        if getattr(args, flag):
            raise InputError(f"--{flag} does not go with --combine, which reads scores that are there, in one process")
    if not args.input or not args.output:
        raise InputError("--combine needs --input and --output")
    how = Combination(
        args.name or args.combine,
        parse_judges(args.judges or ""),
        args.combine,
        args.normalize or "",
        args.missing or "null",
    )
    return combine(args.input, args.output, how, bool(args.overwrite), intake_of(args))


def _single(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The scorer that the flags name, or None where the settings file has them."""
    if args.axis and not args.reward_model:
        raise InputError("--axis chooses an output of --reward_model; in a settings file it is the scorer's `axis`")
    if args.function and args.reward_model:
        raise InputError("--function and --reward_model name one scorer each; put both into a settings file")
    if args.function:
        return [{"name": args.name or args.function.split(":")[-1], "kind": "function", "function": args.function}]
    if args.reward_model:
        axis = {"axis": args.axis} if args.axis else {}
        return [
            {
                "name": args.name or args.axis or "reward_model",
                "kind": "reward_model",
                "model": args.reward_model,
                **axis,
            }
        ]
    if not args.config:
        raise InputError("name a scorer: --config FILE, --function module:name or --reward_model MODEL")
    return None
