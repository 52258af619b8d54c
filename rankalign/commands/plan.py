"""What a training run will take, before any weights are loaded: prompts kept, updates, memory, disk, and advice.

Takes the settings of `rankalign train`. Seconds are given with --probe alone, which loads the model and times it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rankalign.commands import fact_table, show_facts
from rankalign.evaluation.tables import Table

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
    from rankalign.training.arguments import parse
    from rankalign.training.plan import plan

    config, notes = parse(args.config, args.rest)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return plan(config, args.device_memory, args.devices, args.probe)


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
