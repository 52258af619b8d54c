"""Which commands there are, and the parser of each; a command's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from rankalign.commands.help_text import Formatter, example

# Name: (module under rankalign.commands, one line for --help).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "see the whole path on a small model, in minutes"),
    "init": ("init", "a project folder with settings, prompts and a script"),
    "sample": ("sample", "several policies answer each prompt"),
    "score": ("score", "scorers grade the answers"),
    "merge": ("merge", "join what several `--shard` processes wrote; fold an adapter into its base"),
    "plan": ("plan", "what a training run will take, before any weights are loaded"),
    "train": ("train", "learn from the order of the answers"),
    "sweep": ("sweep", "train with several values of some settings, and see which is best"),
    "eval": ("evaluate", "perplexity, reward and text statistics of answers"),
    "compare": ("compare", "two systems on the same prompts: wins, sums, intervals"),
    "chat": ("chat", "talk to a model, or to two and vote; a page or the terminal"),
    "label": ("label", "a page in the browser to rank answers by hand"),
    "sheet": ("sheet", "blinded sheets for human raters: make, read"),
    "convert": ("convert", "between our records and every other tool's format"),
    "convert-config": ("convert_config", "another trainer's settings as ours"),
    "lint": ("lint", "find what is wrong in a file of candidates"),
    "iterate": ("iterate", "train in rounds on the own new answers: IP-n, OP-k, RAFT"),
    "run": ("run", "all of the above as one experiment, with a report"),
    "table": ("paper_table", "the RRHF paper's comparison, every row with every seed"),
    "report": ("report", "one HTML page of a run, or of several side by side"),
    "watch": ("watch", "a run while it trains: a live page, or plots in the terminal"),
    "push": ("push", "publish a trained model on the hub, and nothing else with it"),
    "delta": ("delta", "bit-exact differences between two models: make, apply, verify"),
    "verify": ("verify", "has anything that a run read or wrote changed since?"),
    "diff": ("diff", "what differs between two runs"),
    "env": ("env", "versions, processor and GPUs, for a bug report"),
    "completion": ("completion", "the tab key completes commands and flags, in your shell"),
    "ls": ("ls", "list losses, engines, scorers, formats, templates"),
}


def module_of(command: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"rankalign.commands.{COMMANDS[command][0]}")


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command's own flags, with its help."""
    module = module_of(command)
    parser = argparse.ArgumentParser(
        prog=f"rankalign {command}",
        description=module.__doc__,
        epilog=example(module.EXAMPLE),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    if hasattr(module, "tables"):
        parser.add_argument(
            "--table", metavar="F", help="write what is shown to F.csv, .tsv, .xlsx, .md, .tex or .html"
        )
    module.add_arguments(parser)
    return parser


def takes_more(command: str) -> bool:
    """Whether a command reads settings that its parser does not declare."""
    return bool(getattr(module_of(command), "TAKES_MORE", False))
