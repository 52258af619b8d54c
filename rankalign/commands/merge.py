"""Join the shards of an output that several processes wrote with --shard, or fold a LoRA adapter into its base.

Shards: the file is the one that a single process would have written, byte for byte. Shards that are missing,
unfinished, doubled, or of other settings are refused by name. The shards stay; delete them when you like.
An adapter's folder, with --output: a plain model with its tokenizer, which loads without peft.
"""

from __future__ import annotations

import argparse
from typing import Any

from rankalign.commands import show_facts
from rankalign.errors import InputError

EXAMPLE = "rankalign merge runs/candidates.jsonl"
show = show_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``rankalign merge``."""
    parser.add_argument("path", help="the whole output, beside which its shards stand, or the folder of an adapter")
    parser.add_argument("--output", help="adapter: folder to make")
    parser.add_argument("--overwrite", action="store_true", help="shards: replace what is there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Merge; see :func:`rankalign.stages.generation.merge_shards` and :func:`rankalign.models.merge.merge_lora`."""
    if not args.output:
        from rankalign.stages.generation import merge_shards

        return merge_shards(args.path, args.overwrite)
    if args.overwrite:
        raise InputError(f"{args.output} is never overwritten; name another folder")
    from rankalign.models.merge import merge_lora

    merge_lora(args.path, args.output)
    return {"output": args.output, "adapter": args.path}
