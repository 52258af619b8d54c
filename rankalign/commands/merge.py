"""Join the shards of an output that several processes sampled or scored with --shard.

The file is the one that a single process would have written, byte for byte. Shards that are missing, unfinished,
doubled, or of other settings are refused by name. The shards stay; delete them when you like.
"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.commands import show_facts
from rankalign.generation import merge_shards

EXAMPLE = "rankalign merge runs/candidates.jsonl"
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign merge``."""
    parser.add_argument("output", help="the whole output; its shards stand beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Merge; see :func:`rankalign.generation.merge_shards`."""
    return merge_shards(args.output, args.overwrite)
