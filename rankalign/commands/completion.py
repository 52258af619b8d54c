"""Print what makes a shell complete commands, flags, losses and formats at the tab key.

Add it to the shell once: the example writes the file that bash reads at its start; docs/quickstart.md has zsh's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import Any

from rankalign.commands.parsers import COMMANDS, parser_of, takes_more
from rankalign.errors import missing_extra

EXAMPLE = "rankalign completion bash > ~/.local/share/bash-completion/completions/rankalign"
SHELLS = ("bash", "zsh", "fish", "tcsh")
FILES = ("config", "data", "eval_data", "input", "output", "prompts", "reviews", "list", "file", "a", "b", "F")
FOLDERS = ("output_dir", "base", "target", "delta", "folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS, help="whose completion")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """``{"shell", "script"}``."""
    try:
        import shtab
    except ImportError as error:
        raise missing_extra("completion", "completion") from error
    parser = whole_parser()
    for action in _actions(parser):
        files = shtab.FILE if action.dest in FILES else shtab.DIRECTORY if action.dest in FOLDERS else None
        if files and not action.choices:
            action.complete = files  # type: ignore[attr-defined]
    return {"shell": args.shell, "script": shtab.complete(parser, shell=args.shell)}


def whole_parser() -> argparse.ArgumentParser:
    """Every command under one parser, with the settings that ``train`` reads by itself."""
    parser = argparse.ArgumentParser(prog="rankalign")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command")
    for name, (_, summary) in COMMANDS.items():
        own = parser_of(name)
        added = commands.add_parser(name, help=summary, parents=[own], add_help=False)
        if takes_more(name):
            _add_settings(added)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from rankalign.data.formats import FORMATS
    from rankalign.losses import LOSSES
    from rankalign.losses.reward import REWARD_LOSSES
    from rankalign.training.arguments import PPOConfig
    from rankalign.training.settings import METHODS

    choices = {"loss": [*LOSSES, *REWARD_LOSSES], "format": ["auto", *FORMATS], "method": METHODS}
    for item in dataclasses.fields(PPOConfig):
        with contextlib.suppress(argparse.ArgumentError):  # a flag of the command itself
            text = " ".join(str(item.metadata.get("help", "")).split())
            parser.add_argument(f"--{item.name}", choices=choices.get(item.name), help=text.replace("%", "%%"))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for each in action.choices.values() for inner in _actions(each)]
    return found


def show(result: dict[str, Any]) -> None:
    """Print the script."""
    print(result["script"])
