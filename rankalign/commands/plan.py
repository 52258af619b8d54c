"""What a training run will take, before any weights are loaded: prompts kept, updates, memory, disk, and advice.

Takes the settings of `rankalign train`. Seconds are given with --probe alone, which loads the model and times it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankalign.commands import show_facts
from rankalign.training.arguments import parse
from rankalign.training.plan import plan

EXAMPLE = "rankalign plan --config train_scripts/configs/rrhf.yaml --data runs/scored.jsonl --device_memory 24GiB"
TAKES_MORE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our own flags; everything else is a setting of training."""
    parser.add_argument("--config", help="YAML file with settings of `rankalign train`")
    parser.add_argument("--device_memory", default="", help="memory of one device, such as 24GiB (this machine's)")
    parser.add_argument("--devices", type=int, default=0, help="how many devices share the run (this machine's)")
    parser.add_argument("--probe", action="store_true", help="load the model and time three lists (off by default)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan; see :func:`rankalign.training.plan.plan`."""
    config, notes = parse(args.config, args.rest)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return plan(config, args.device_memory, args.devices, args.probe)


def show(result: dict[str, Any]) -> None:
    """The facts, then the advice as sentences."""
    facts = dict(result)
    advice = facts.pop("advice")
    facts["seconds"] = (
        "not measured; --probe loads the model and times it" if facts["seconds"] is None else facts["seconds"]
    )
    show_facts(facts)
    print("\n".join(["", *advice]))
