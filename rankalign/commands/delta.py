"""Bit-exact differences between two models of one shape: make one, apply one, verify one.

apply gives back the very bits of the target; verify also compares a base and a target with what the delta was made of.
"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.commands import show_facts
from rankalign.errors import InputError

EXAMPLE = "rankalign delta make --base default --target runs/rrhf --delta runs/delta"
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action and the three folders."""
    parser.add_argument("action", choices=("make", "apply", "verify"))
    parser.add_argument("--base", default="", help="the model both sides have: default, a folder or a hub id")
    parser.add_argument("--target", default="", help="the other model: read by make and verify, written by apply")
    parser.add_argument("--delta", default="", help="the delta's folder: written by make, read by apply and verify")
    parser.add_argument("--merge_adapter", action="store_true", help="make: fold a LoRA target into its base first")
    parser.add_argument(
        "--new_rows",
        choices=("zero", "mean"),
        default="zero",
        help="apply, arithmetic deltas of 2023: what rows of added tokens start from",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """``{"tensors", "bytes", "sha256", "bit_exact"}``; exit code 1 where something does not match."""
    needed = ("delta",) if args.action == "verify" else ("base", "target", "delta")
    if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
        raise InputError(f"delta {args.action} needs {', '.join(missing)}")
    from rankalign.models import delta

    if args.action == "make":
        return delta.make(args.base, args.target, args.delta, merge_adapter=args.merge_adapter)
    if args.action == "apply":
        return delta.apply(args.base, args.delta, args.target, new_rows=args.new_rows)
    return delta.verify(args.delta, args.base, args.target)
