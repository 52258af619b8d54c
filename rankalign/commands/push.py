"""Publish a trained model on the hub: weights, tokenizer, configuration and card.

Nothing else ever leaves: no checkpoints with the optimiser's state, no logs, no data, no journals, no manifest with
paths of this machine. What is sent, and what is not, is printed. Log in once with `hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.commands import show_facts

EXAMPLE = "rankalign push runs/rrhf my-name/smollm2-rrhf --private"
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and the repository."""
    parser.add_argument("folder", help="a finished run's folder, or any that holds a model")
    parser.add_argument("repo", help="the repository: NAME, or ORGANISATION/NAME")
    parser.add_argument("--private", action="store_true", help="where it is made now, for you alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Push; see :func:`rankalign.recipes.push.push`."""
    from rankalign.recipes.push import push

    return push(args.folder, args.repo, args.private)
