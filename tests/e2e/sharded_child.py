"""One of two processes that load a model by parts and save it: ``python -m tests.e2e.sharded_child KIND MODEL OUT``.

Each writes to ``OUT.RANK`` what its memory grew by at most, as the kernel counts it, and whether its weights are right.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open

from rankalign.models import load as models
from rankalign.models import sharded
from rankalign.training import spread
from rankalign.training.arguments import parse_settings
from tests.e2e import cpu_launch


def memory(field: str) -> int:
    """Bytes that ``/proc/self/status`` gives for a field."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


class Growth:
    """Of the memory of this process, at most, in a context."""

    def __enter__(self) -> Growth:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
        self.before = memory("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        self.most = memory("VmHWM") - self.before


def equal(model: Any, folder: Path) -> bool:
    """Whether every weight, gathered, is that of the files."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                whole = sharded._whole(model.get_parameter(name), True)
                if whole is None or not torch.equal(whole, stored.get_tensor(name)):
                    return False
    return True


def main(kind: str, model: str, out: str) -> None:
    if kind.startswith("fsdp"):
        cpu_launch.fsdp_on_cpu()
    cpu_launch.no_compiled_communication()
    config = parse_settings({"model": model, "data": "none", "output_dir": out + "-run"})
    PartialState()
    first = PartialState().is_main_process
    facts: dict[str, Any] = {"way": spread.by_parts(config)}
    if kind.endswith("plain"):  # how it was done before: the measure of the measure
        with Growth() as growth:
            whole = models.load_policy(model, dtype="float32")
            facts["sum"] = sum(float(weight.sum()) for weight in whole.parameters())  # else they are a map of the files
        facts["load"] = growth.most
    else:
        with Growth() as growth:
            loaded = spread.load(config)
        facts |= {"load": growth.most, "equal": equal(loaded, Path(model))}
        sharded.FILE = "60MB"
        with Growth() as growth:
            sharded.save(loaded, Path(out + "-saved"), first)
        facts["save"] = growth.most
    Path(f"{out}.{PartialState().process_index}").write_text(json.dumps(facts))
    PartialState().wait_for_everyone()
    os._exit(0)  # taking gloo's threads down at the end may hang, and says nothing about memory


if __name__ == "__main__":
    main(*sys.argv[1:])
