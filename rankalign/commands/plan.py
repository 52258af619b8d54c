"""What a training run will take, before any weights are loaded: prompts kept, updates, memory, disk, and advice.

Takes the settings of `rankalign train`. With --device it plans for a card that is not here, and --model may be a shape
(llama-8b, llama-70b, qwen2.5-0.5b, -1.5b, -7b, -32b, ...) without weights or data.

Seconds are given with --probe alone, which loads the model and times it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankalign.commands import fact_table, show_facts
from rankalign.errors import InputError
from rankalign.evaluation.tables import Table

EXAMPLE = "rankalign plan --config train_scripts/configs/rrhf.yaml --data runs/scored.jsonl --device_memory 24GiB"
TAKES_MORE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our own flags; everything else is a setting of training."""
    parser.add_argument("--config", help="YAML file with settings of `rankalign train`")
    parser.add_argument("--device_memory", default="", help="memory of one device, such as 24GiB (this machine's)")
    parser.add_argument("--devices", type=int, default=0, help="how many devices share the run (this machine's)")
    parser.add_argument("--device", default="", help="a card that need not be here: h100, a100, a100-40, 4090, l4, ...")
    parser.add_argument("--sharding", default="none", help="over --devices: none, ddp, zero2, fsdp2 or zero3 (none)")
    parser.add_argument("--offload", action="store_true", help="what is sharded waits on the host")
    parser.add_argument("--vllm_share", type=float, default=0.0, help="share of each card that vLLM takes beside (0)")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="with --device, without --data (512)")
    parser.add_argument("--response_tokens", type=int, default=256, help="with --device, without --data (256)")
    parser.add_argument("--candidates", type=int, default=4, help="with --device, without --data (4)")
    parser.add_argument("--probe", action="store_true", help="load the model and time three lists (off by default)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan; see :func:`rankalign.training.plan.plan`."""
    from rankalign.training.arguments import parse
    from rankalign.training.locate import locate
    from rankalign.training.plan import plan, plan_on_card
    from rankalign.training.plan.cards import memory_of
    from rankalign.training.plan.on_card import Setup

    config, notes = parse(args.config, args.rest)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    locate(config)
    if not args.device:
        if (args.sharding, args.offload, args.vllm_share) != ("none", False, 0.0):
            raise InputError("--sharding, --offload and --vllm_share are planned for a card: name it with --device")
        return plan(config, args.device_memory, args.devices, args.probe)
    if args.probe or args.device_memory:
        raise InputError("--device names a card that need not be here: leave out --probe and --device_memory")
    sizes = args.prompt_tokens, args.response_tokens, args.candidates
    if min(sizes) < 1:
        raise InputError("--prompt_tokens, --response_tokens and --candidates are at least 1")
    setup = Setup(memory_of(args.device), args.devices or 1, args.sharding, args.offload, args.vllm_share)
    return plan_on_card(config, setup, args.device, sizes)


def tables(result: dict[str, Any]) -> list[Table]:
    """The facts, a row each; what belongs together has a name with a dot."""
    return [fact_table("Plan", _facts(result), "; ".join(result["advice"]))]


def show(result: dict[str, Any]) -> None:
    """The facts, then the advice as sentences."""
    show_facts(_facts(result))
    print("\n".join(["", *result["advice"]]))


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    seconds = result["seconds"]
    told = "not measured; --probe loads the model and times it" if seconds is None else seconds
    return {**{name: value for name, value in result.items() if name != "advice"}, "seconds": told}
