"""Checkpoints of PPO: trainable weights and optimiser as safetensors, everything else as JSON."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from rankalign.storage.files import write_text
from rankalign.storage.folders import new_folder
from rankalign.storage.jsonl import dumps, loads

WEIGHTS, OPTIMIZER = "weights.", "optimizer."
FACTS = "state.json"


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name; tied ones once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save(folder: Path, module: nn.Module, optimizer: Optimizer, facts: dict[str, Any], keep: int | None) -> None:
    """Write a checkpoint, whole or not at all, and remove all but the newest ``keep`` of the run."""
    tensors = {WEIGHTS + name: p.detach() for name, p in trainable(module).items()}
    names = list(trainable(module))
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{names[index]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    with new_folder(folder) as fresh:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, fresh / "state.safetensors")
        write_text(fresh / FACTS, dumps(facts) + "\n")
    drop_old(folder, keep)


def drop_old(folder: Path, keep: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` of the run that has just written ``folder``."""
    for old in checkpoints(folder.parent)[: -keep if keep else 0]:  # only now: a kill leaves one too many, never none
        shutil.rmtree(old)


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {int(m[1]): p for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return [found[step] for step in sorted(found)]


def read_facts(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return dict(loads((folder / FACTS).read_text(encoding="utf-8")))


@torch.no_grad()
def load(folder: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Put weights and the optimiser's state back; module and optimiser must be built as they were."""
    tensors = load_file(folder / "state.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, p) in enumerate(trainable(module).items()):
        p.copy_(tensors[WEIGHTS + name])
        prefix = f"{OPTIMIZER}{name}/"
        state[index] = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
