"""Several policies answer each prompt; the candidates land in one file.

The settings file names the policies (`data_generation/configs/` has examples); without one, `--model` answers each
prompt once. Killed or interrupted, the same command goes on where it stopped and ends in the very file that an
uninterrupted run writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from rankalign.commands import add_reading_arguments, add_scale_arguments, reading_flags, scale_flags, show_facts
from rankalign.config import SampleConfig, load, resolve_near
from rankalign.errors import InputError

EXAMPLE = "rankalign sample --config data_generation/configs/demo.yaml --output runs/candidates.jsonl"
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign sample``; they win over the settings file."""
    parser.add_argument("--config", help="YAML file with prompts, output and policies")
    parser.add_argument("--prompts", help="records with the prompts (JSON Lines)")
    parser.add_argument("--output", help="where the candidates go")
    parser.add_argument("--seed", type=int, help="base seed of all policies")
    parser.add_argument("--max_prompts", type=int, help="take the first so many prompts")
    parser.add_argument("--model", help="in the place of `default` in every policy; without --config, who answers")
    parser.add_argument(
        "--engine", help="without --config: hf or vllm; by itself vllm on a GPU where it is installed, else hf"
    )
    add_scale_arguments(parser)
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Sample; see :func:`rankalign.stages.generation.sample`."""
    from rankalign.stages.generation import sample

    config = load(
        SampleConfig,
        args.config,
        prompts=args.prompts,
        output=args.output,
        seed=args.seed,
        max_prompts=args.max_prompts,
        **scale_flags(args),
        **reading_flags(args),
        **_one_policy(args),
    )
    if args.config and args.model and not any(policy.model == "default" for policy in config.policies):
        named = ", ".join(dict.fromkeys(policy.model for policy in config.policies if policy.model))
        raise InputError(
            f"--model {args.model} stands for `model: default` in a policy, and {args.config} names {named or 'none'}: "
            "write default there, or leave --model out"
        )
    return sample(_placed(config, args) if args.config else config)


def _one_policy(args: argparse.Namespace) -> dict[str, Any]:
    """Without a settings file: the model, under its own name."""
    if args.config and args.engine:
        raise InputError("--engine is for sample without --config: write engine: into the policies of the file")
    if args.config:
        return {}
    if not args.model:
        raise InputError("sample: give --config FILE, or --model with --prompts and --output")
    engine = args.engine or _fastest()
    return {"policies": [{"name": Path(args.model).name, "model": args.model, "engine": engine}]}


def _fastest() -> str:
    """The engine to answer with where none is named."""
    from rankalign.models.devices import device

    if importlib.util.find_spec("vllm") is None or device().type != "cuda":
        return "hf"
    print("engine: vllm, which is installed and fastest on a GPU; --engine hf takes the other", file=sys.stderr)
    return "vllm"


def _placed(config: SampleConfig, args: argparse.Namespace) -> SampleConfig:
    """Paths of the settings file found, and ``--model`` in its place."""
    from dataclasses import replace

    policies = [
        replace(
            policy,
            model=args.model if args.model and policy.model == "default" else policy.model,
            file=resolve_near(policy.file, args.config) if policy.file else "",
        )
        for policy in config.policies
    ]
    return replace(config, prompts=resolve_near(config.prompts, args.config), policies=policies)
