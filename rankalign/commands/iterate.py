"""Train in rounds: the model answers anew, the answers are graded, it learns from their order.

IP-n: --rounds N whole training runs, each on answers of the model before it. OP-k: one run whose prompts are answered
anew every --refresh_every K updates. With `loss: raft` the rounds are RAFT's. Killed or interrupted, the same command
goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rankalign.config import load, resolve_near
from rankalign.errors import InputError
from rankalign.evaluation.tables import Table, render
from rankalign.storage.jsonl import loads

EXAMPLE = "rankalign iterate --config train_scripts/configs/ip.yaml --rounds 3 --output runs/ip3"
FLAGS = (
    "output", "prompts", "model", "rounds", "refresh_every", "kl_coef", "seed", "max_prompts", "keep", "overwrite",
    "ahead", "num_processes", "launch",
)  # fmt: skip
SHOWN = ("round", "refreshed_at", "steps", "prompts", "mean_score", "max_score", "kl", "sampled_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign iterate``; they win over the settings file."""
    parser.add_argument("--config", required=True, help="YAML file with policies, scorers and training settings")
    parser.add_argument("--output", help="folder of the run")
    parser.add_argument("--prompts", help="records with the prompts (JSON Lines)")
    parser.add_argument("--model", help="the model to start from")
    parser.add_argument("--rounds", type=int, help="IP: how many rounds")
    parser.add_argument("--refresh_every", type=int, help="OP: answer anew every so many updates; 0 is IP")
    parser.add_argument("--kl_coef", type=float, help="weight of the divergence from the start model in the score")
    parser.add_argument("--train", metavar="JSON", help="more settings of training, as an object", default="{}")
    parser.add_argument("--seed", type=int, help="seed of sampling and training")
    parser.add_argument("--max_prompts", type=int, help="take the first so many prompts")
    parser.add_argument("--keep", choices=("all", "last"), help="models of all IP rounds, or the last alone")
    parser.add_argument("--overwrite", action="store_true", default=None, help="start over")
    parser.add_argument(
        "--async",
        "--ahead",
        dest="ahead",
        type=int,
        choices=(0, 1),
        help="OP: 1 answers the next block as one trains",
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="sample, grade and train in so many, one a GPU")
    parser.add_argument("--launch", help="how they share the training: ddp, fsdp2, zero2 or zero3")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run; see :func:`rankalign.recipes.iterate.run`."""
    from rankalign.training.processes import only_first_speaks

    with only_first_speaks():
        return _run(args)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from rankalign.recipes.iterate import IterateConfig
    from rankalign.recipes.iterate import run as run_rounds

    config = load(IterateConfig, args.config, **{name: getattr(args, name) for name in FLAGS})
    policies = [replace(p, file=resolve_near(p.file, args.config) if p.file else "") for p in config.policies]
    if config.num_processes < 0:
        raise InputError(f"num_processes {config.num_processes} makes no sense")
    if config.refresh_every and (config.launch or config.num_processes > 1) and "LOCAL_RANK" not in os.environ:
        _launch(config.launch or "ddp", config.num_processes, list(_words(args)))
    prompts, training = resolve_near(config.prompts, args.config), {**config.train, **_object(args.train)}
    return run_rounds(replace(config, prompts=prompts, policies=policies, train=training))


def _words(args: argparse.Namespace) -> Iterator[str]:
    """The command line, typed anew."""
    yield from ("--config", args.config, "--train", args.train)
    for name in FLAGS:
        if (value := getattr(args, name)) is not None and name not in ("num_processes", "launch"):
            yield from (f"--{name}",) if value is True else (f"--{name}", str(value))
    if args.json:
        yield "--json"
    if args.table:
        yield from ("--table", args.table)


def _launch(how: str, processes: int, words: list[str]) -> None:
    """Become the launcher of the processes that sample and train together."""
    from rankalign.recipes.launch import launcher

    command = launcher(how, processes, words, "iterate")
    print(f"starting: {shlex.join(command)}", file=sys.stderr, flush=True)
    os.execv(command[0], command)


def _object(text: str) -> dict[str, Any]:
    try:
        return dict(loads(text))
    except (TypeError, ValueError):
        raise InputError(f"--train: expected a JSON object, found {text}") from None


def tables(result: dict[str, Any]) -> list[Table]:
    """A table of the rounds, and where the model is."""
    table = Table("Rounds", list(SHOWN), [[row[name] for name in SHOWN] for row in result["rounds"]])
    table.note = f"model: {result['model']} after {result['steps']} updates, {result['sampled_tokens']} sampled tokens"
    return [table]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    render(tables(result)[0])
