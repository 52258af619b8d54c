"""Reward models that other trainers save as a language model beside a value head: trl, trlX, DeepSpeed-Chat.

Their folders hold the configuration of the language model and weights under names of their own, often in a ``.bin``:
``v_head.summary.weight`` (trl) or ``v_head.weight`` beside a trunk that may stand under ``pretrained_model.``,
``transformer.`` or ``rwtranrsformer.`` (sic). GRM (Yang et al. 2024, arXiv:2406.10216) saves a head of several layers,
ReLU between them: ``v_head.summary.0.weight``, ``v_head.summary.2.weight``, ... No code of a ``.bin`` runs when it is
read.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rankalign.errors import InputError
from rankalign.models import weights

HEADS = ("v_head.summary", "v_head")
LEFT_OUT = ("lm_head.", "embed_out.", ".attn.bias", ".masked_bias", ".inv_freq", ".attention.bias")
"""Weights beside trunk and head: those of the language-model head, and buffers that old versions stored."""


def has_value_head(folder: str) -> bool:
    """Whether the weights in a folder name a value head.

    Raises:
        InputError: they lie in a ``.bin`` that holds something else than tensors.
    """
    if not Path(folder).is_dir() or not files(Path(folder)):
        return False
    return any("v_head." in name for file in weights.any_tensors(folder).values() for name in file)


def load(folder: str, dtype: torch.dtype) -> Any:
    """The reward model as a sequence classifier whose head ``score`` is the value head.

    Raises:
        InputError: a weight of the trunk is missing or of another shape, or one is left that means nothing here.
    """
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_config(config, dtype=dtype)
    tensors = {name: tensor for file in files(Path(folder)) for name, tensor in tensors_of(file).items()}
    head = {name: tensors.pop(name) for name in list(tensors) if "v_head." in name}
    model.score = head_of(folder, head).to(torch.promote_types(dtype, torch.float32))
    if reads_last(config, model.score):
        model.config.rankalign_pooling = "last"
    wanted, found = dict(model.base_model.state_dict()), {}
    for name, tensor in tensors.items():
        own = next((tail for tail in _tails(name) if tail in wanted), None)
        if own is not None:
            found[own] = tensor
        elif not any(mark in f".{name}" for mark in LEFT_OUT):
            raise InputError(f"model {folder}: {name} belongs neither to its {config.model_type} nor to its value head")
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            has = f"has shape {list(found[name].shape)}" if name in found else "is not there"
            raise InputError(f"model {folder}: {name} {has}, and {list(tensor.shape)} is needed")
    model.base_model.load_state_dict(found)
    return model


def reads_last(config: Any, head: nn.Module) -> bool:
    """Whether it is GRM, which reads the last token by the mask, whatever its id."""
    return hasattr(config, "vhead_layer_type") or isinstance(head, nn.Sequential)


def head_of(folder: str, tensors: dict[str, Tensor]) -> nn.Module:
    """The linear layer of the value head, or its layers.

    Args:
        folder: for messages.
        tensors: those with ``v_head.`` in their names.

    Raises:
        InputError: they are neither.
    """
    named = {name[name.index("v_head.") :]: tensor for name, tensor in tensors.items()}
    if layers := _layers({n.removeprefix("v_head.summary."): t for n, t in named.items()}):
        return layers
    prefix = next((prefix for prefix in HEADS if f"{prefix}.weight" in named), None)
    if prefix is None or set(named) - {f"{prefix}.weight", f"{prefix}.bias"} or len(named[f"{prefix}.weight"]) != 1:
        raise InputError(
            f"model {folder}: its value head ({', '.join(sorted(named))}) is no linear layer of one output; save one "
            "as score.weight (1, hidden) of a sequence classifier with num_labels 1"
        )
    weight, bias = named[f"{prefix}.weight"], named.get(f"{prefix}.bias")
    layer = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def _layers(tensors: dict[str, Tensor]) -> nn.Sequential | None:
    """Linear layers numbered 0, 2, ..., with ReLU between them, that end in one output; None for anything else."""
    count = len(tensors) // 2
    names = {f"{2 * number}.{what}" for number in range(count) for what in ("weight", "bias")}
    weights = [tensors[f"{2 * number}.weight"] for number in range(count)] if set(tensors) == names else []
    fit = all(len(below) == above.shape[1] for below, above in itertools.pairwise(weights))
    if len(weights) < 2 or not fit or len(weights[-1]) != 1:
        return None
    linear = [nn.Linear(weight.shape[1], len(weight)) for weight in weights]
    head = nn.Sequential(*[part for layer in linear for part in (layer, nn.ReLU())][:-1])
    head.load_state_dict(tensors)
    return head


def _tails(name: str) -> list[str]:
    """A name without nothing, one, two, ... of its first parts."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def files(folder: Path) -> list[Path]:
    """Weight files of the folder; safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def tensors_of(file: Path) -> dict[str, Tensor]:
    """All tensors of a weight file; no code of a ``.bin`` runs."""
    if file.suffix == ".safetensors":
        return load_file(file)
    # Tensors alone, no code.
    found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return found
