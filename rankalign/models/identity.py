"""What a model computes by beside its weights: the settings that its folder holds, and the base of an adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rankalign.models import load as models

# What saving and loading write of their own accord, or what says where and in which type a model was held last.
NO_MATTER = frozenset(
    (
        "transformers_version",
        "peft_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "use_cache",
        "inference_mode",
        "revision",
        "base_model_name_or_path",
    )
)
SETS = ("target_modules", "modules_to_save", "target_parameters")  # peft writes their names in an order of the moment


def config_of(model: str) -> str:
    """64 hex digits over what a model's folder says of how its weights are used; empty for a hub id.

    Positions, windows, caps and the scale of an adapter change every log-probability of the same weights. An adapter's
    base counts with its weights and settings.
    """
    where = models.resolve(model)
    if not Path(where).is_dir():
        return ""
    told: list[Any] = [_read(Path(where) / name) for name in ("config.json", "adapter_config.json")]
    base = models.base_and_adapter(model, "")[0] if models.is_adapter(model) else ""
    if base:
        told += [models.weights_of(base), config_of(base)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Any:
    try:
        return _settings(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # none, or none that can be read: loading says so better
        return None


def _settings(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key not in NO_MATTER and not key.startswith("_")}
        return {key: _settings(one, key) for key, one in kept.items()}
    return sorted(map(str, value)) if isinstance(value, list) and name in SETS else value
