"""Train on ranked candidates: any ranking loss over all N answers of a prompt, SFT on the best, or PPO on prompts.

Settings come from a YAML file and from flags, and flags win. Names of other trainers (--dataset_name,
--model_name_or_path, --loss_type, --evaluation_strategy, ...) are mapped, and said. Interrupted, the same command
resumes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any, NoReturn

from rankalign.commands import show_facts

EXAMPLE = "rankalign train --config train_scripts/configs/rrhf.yaml --data runs/scored.jsonl --learning_rate 1e-5"
TAKES_MORE = True
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config``; everything else is a setting."""
    parser.add_argument("--config", help="YAML file with settings; may stand first without --config")
    parser.add_argument("--num_processes", type=int, default=0, metavar="N", help="start so many, one a GPU")
    parser.add_argument(
        "--launch", default="", help="how they share the work: ddp, fsdp2, zero2 or zero3; slurm[:HOW] writes a script"
    )
    parser.add_argument("--help_all", action="store_true", help=argparse.SUPPRESS)  # the same as --help all


def topics(topic: str) -> str:
    """What ``--help`` shows above the flags of this command, or ``--help TOPIC`` alone.

    Raises:
        ValueError: there is no such topic.
    """
    from rankalign.training import help as texts

    if topic == texts.ALL:
        return _every_flag()
    return texts.group(topic) if topic else texts.first()


def _every_flag() -> str:
    """Every setting with its help, which takes importing transformers."""
    from transformers import HfArgumentParser

    from rankalign.commands.help_text import Formatter
    from rankalign.training.arguments import PPOConfig

    every: Any = PPOConfig
    parser = HfArgumentParser(every, prog="rankalign train", add_help=False, formatter_class=Formatter)
    return str(parser.format_help())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; see :func:`rankalign.training.run.train` and :func:`rankalign.training.ppo.run.train_ppo`."""
    from rankalign.training.processes import only_first_speaks

    if (args.launch or args.num_processes) and "LOCAL_RANK" not in os.environ:  # which every launcher sets
        return _launch(args)
    with only_first_speaks():
        return _train(args)


def _launch(args: argparse.Namespace) -> dict[str, Any]:
    """Become the launcher, so that signals and the exit code are its own; or write what hands the run in."""
    from rankalign.errors import InputError
    from rankalign.recipes.launch import SCRIPT, launcher, slurm_script
    from rankalign.storage.files import write_text

    if args.num_processes < 0:
        raise InputError(f"--num_processes {args.num_processes} makes no sense")
    kind, _, how = args.launch.partition(":")
    words = ["--config", args.config] * bool(args.config) + args.rest
    if kind == SCRIPT:
        write_text("train.slurm", slurm_script(how or "ddp", args.num_processes, words))
        return {"script": "train.slurm", "next": "sbatch train.slurm"}
    command = launcher(args.launch or "ddp", args.num_processes, words + ["--json"] * args.json)
    print(f"starting: {shlex.join(command)}", file=sys.stderr, flush=True)
    return _become(command)


def _become(command: list[str]) -> NoReturn:
    os.execv(command[0], command)


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from rankalign.recipes import push
    from rankalign.recipes.rollouts import reward_of, sampler_of, watch_of
    from rankalign.training.added_tokens import add_tokens
    from rankalign.training.arguments import PPOConfig, parse
    from rankalign.training.ppo.run import train_ppo
    from rankalign.training.processes import is_first
    from rankalign.training.run import train

    config, notes = parse(args.config, args.rest)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if config.publish and is_first():
        push.check_name(config.publish[0])
        push.check_login()
    add_tokens(config)
    if isinstance(config, PPOConfig):
        done = train_ppo(config, sampler_of(config), reward_of(config))
    else:
        done = train(config, watch_of)
    if config.publish and is_first():
        done["pushed"] = push.push(done["output"], *config.publish)["url"]
    return done
