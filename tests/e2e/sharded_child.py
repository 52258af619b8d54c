"""One of two processes that load a model by parts and save it: ``python -m tests.e2e.sharded_child KIND MODEL OUT``.

KIND is ``fsdp`` or ``zero3``, and after a hyphen ``plain`` (everything is loaded everywhere), ``dora``, ``reward``, or
``adapter``: the one that lies in the folder ``adapter`` of the model's.

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


MORE: dict[str, dict[str, Any]] = {
    "dora": {"use_lora": True, "use_dora": True},
    "adapter": {"use_lora": True},
    "reward": {"method": "reward"},
}


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """Every weight, whole, by the name that it has in the files; all processes come here."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {}
    for name, parameter in inner.named_parameters():
        whole = sharded.collected(parameter, True)
        assert whole is not None
        found[name.replace(".base_layer.", ".")] = whole
    return found


def equal(found: dict[str, torch.Tensor], folder: Path) -> bool:
    """Whether every weight is that of the files, but for a head that a reward model has none of."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if "score.weight" in found and name == "lm_head.weight":
                    continue
                if not torch.equal(found[name], stored.get_tensor(name)):
                    return False
    return True


def own(found: dict[str, torch.Tensor], kind: str, folder: Path) -> bool:
    """Whether what lies beside the weights of the files is what it is to start from."""
    if kind.endswith("dora"):
        lengths = {name: t for name, t in found.items() if "magnitude" in name}
        rows = {name: found[name.split(".lora_magnitude")[0] + ".weight"].norm(dim=1) for name in lengths}
        return len(lengths) > 30 and all(torch.allclose(t, rows[name], rtol=1e-6) for name, t in lengths.items())
    if kind.endswith("adapter"):
        with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as stored:
            wanted = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        mine = {name.replace(".default.", "."): t for name, t in found.items() if "lora_" in name}
        return len(mine) == len(wanted) and all(
            torch.equal(mine[name.removeprefix("base_model.model.")], t) for name, t in wanted.items()
        )
    return not kind.endswith("reward") or 0.015 < float(found["score.weight"].std()) < 0.025


def main(kind: str, model: str, out: str) -> None:
    if kind.startswith("fsdp"):
        cpu_launch.fsdp_on_cpu()
    cpu_launch.no_compiled_communication()
    name = f"{model}/adapter" if kind.endswith("adapter") else model
    more = MORE.get(kind.partition("-")[2], {})
    config = parse_settings({"model": name, "data": "none", "output_dir": out + "-run", **more})
    tokenizer = models.load_tokenizer(model)
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
            loaded = spread.load(config, tokenizer)
        found = gathered(loaded)
        facts |= {"load": growth.most, "equal": equal(found, Path(model)), "own": own(found, kind, Path(model))}
        del found
        sharded.FILE = "60MB"
        with Growth() as growth:
            sharded.save(loaded, Path(out + "-saved"), first)
        facts["save"] = growth.most
    Path(f"{out}.{PartialState().process_index}").write_text(json.dumps(facts))
    PartialState().wait_for_everyone()
    os._exit(0)  # taking gloo's threads down at the end may hang, and says nothing about memory


if __name__ == "__main__":
    main(*sys.argv[1:])
