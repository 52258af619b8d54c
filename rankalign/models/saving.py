"""What is made sure before a model is saved, and of the folder afterwards: sound generation settings, the type of its
weights, files that others may read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import GenerationConfig

from rankalign.storage.files import atomic_writer, write_text
from rankalign.storage.folders import readable

# Read by sampling alone; beside `do_sample: false` transformers refuses to save them.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def repair_generation(model: Any, where: str) -> None:
    """Mend a ``generation_config.json`` that contradicts itself, and say so: transformers would load it and then refuse
    to save it, at the first checkpoint of a long run.

    Args:
        model: freshly loaded.
        where: its name, for the message.
    """
    told = getattr(model, "generation_config", None)
    if told is None or not (reason := _contradiction(told)):
        return
    # What the file asks for stays, greedy answers or a single beam; the rest had no say in them.
    idle = (() if told.do_sample else _SAMPLING) + (_BEAMS if (told.num_beams or 1) == 1 else ())
    for name in idle:
        if getattr(told, name, None) is not None:
            setattr(told, name, None)
    if _contradiction(told):
        make: Any = GenerationConfig
        model.generation_config = make(**{name: getattr(told, name, None) for name in _TOKENS})
    print(f"model {where}: generation_config.json contradicts itself and is mended: {reason}", file=sys.stderr)


def _contradiction(told: Any) -> str:
    """Why transformers would not save the settings, in one line; empty where it would."""
    try:
        told.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:300]
    return ""


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The floating type of a model's weights on disk, where all have one; None where they differ or none is there."""
    found = {dtype for path in folder.glob("*.safetensors") for dtype in _dtypes(path)}
    return found.pop() if len(found) == 1 else None


def _dtypes(path: Path) -> set[torch.dtype]:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    with safe_open(path, framework="pt") as stored:
        named = {stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118
    return {kinds[name] for name in named if name in kinds}


def cast_folder(folder: Path, dtype: torch.dtype) -> None:
    """Store the weights of a saved model in another type: float32 masters become what their base was published in.

    File by file, each whole or not at all; adapters stay as they are.
    """
    paths = [path for path in sorted(folder.glob("*.safetensors")) if path.name.startswith(("model", "pytorch_model"))]
    size = 0
    for path in paths:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata()
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        with atomic_writer(path) as out:
            out.write(save(tensors, about))
    if paths:
        _note_dtype(folder, dtype, size)


def _note_dtype(folder: Path, dtype: torch.dtype, size: int) -> None:
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    write_text(config, json.dumps({**told, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
    if index.is_file():
        told = json.loads(index.read_text(encoding="utf-8"))
        told["metadata"] = {**told.get("metadata", {}), "total_size": size}
        write_text(index, json.dumps(told, indent=2) + "\n")


def finish(folder: Path, base: Path | None = None, keep_float32: bool = False) -> None:
    """Of a folder just saved: weights in the type of the base's, said where that is not float32, and files that
    whoever may read others may read.

    Args:
        folder: the saved model.
        base: the folder that it started from; None where nothing is to be cast.
        keep_float32: keep the float32 masters.
    """
    dtype = stored_dtype(base) if base is not None else None
    if dtype in (torch.bfloat16, torch.float16) and not keep_float32 and (folder / "config.json").is_file():
        cast_folder(folder, dtype)
        print(f"{folder}: saved in {str(dtype).removeprefix('torch.')}, as its base is", file=sys.stderr)
    readable(folder)
