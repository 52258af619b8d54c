"""Settings of TRL, LLaMA-Factory, axolotl, ms-swift or OpenRLHF as ours, from a file or a command line after --.

Every setting is accounted for: taken as it is, mapped to another name or value, or left out with the reason.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankalign.errors import InputError

EXAMPLE = "rankalign convert-config -- trl dpo --model_name_or_path ORG/MODEL --dataset_name ORG/DATA --beta 0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file or a command line."""
    parser.add_argument("what", nargs="+", metavar="FILE | -- COMMAND ...", help="a YAML file, or what they typed")
    parser.add_argument(
        "--from", dest="tool", default="", metavar="TOOL", help="trl, llamafactory, axolotl, swift or openrlhf"
    )
    parser.add_argument("--output", metavar="F.yaml", help="write the settings there instead of printing them")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Translate; see :mod:`rankalign.training.foreign`."""
    import dataclasses

    from rankalign.losses import LOSSES
    from rankalign.losses.reward import REWARD_LOSSES
    from rankalign.storage.files import write_text
    from rankalign.training.arguments import PPOConfig
    from rankalign.training.foreign import translate_command, translate_file

    options = {name for losses in (LOSSES, REWARD_LOSSES) for entry in losses.values() for name in entry.defaults}
    known = {item.name for item in dataclasses.fields(PPOConfig)} | options
    if len(args.what) == 1:
        done = translate_file(args.what[0], args.tool, known)
    elif args.tool:
        raise InputError("--from goes with a file; a command line says itself whose it is")
    else:
        done = translate_command(args.what, known)
    if args.output:
        write_text(args.output, _text(done.settings))
    return {**dataclasses.asdict(done), "output": args.output or ""}


def show(result: dict[str, Any]) -> None:
    """The settings on stdout, what became of each on stderr."""
    for word in ("mapped", "left", "notes"):
        for line in result[word]:
            print(f"{word}: {line}", file=sys.stderr)
    if result["output"]:
        print(f"{result['output']}: {len(result['settings'])} settings; rankalign train {result['output']}")
    else:
        print(_text(result["settings"]), end="")


def _text(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
