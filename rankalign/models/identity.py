"""What a model computes by beside its weights: the settings that its folder holds, the base of an adapter, and how text
becomes its tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.storage.jsonl import dumps

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


def tokenizer_hash(model: str) -> str:
    """64 hex digits over what turns text into tokens: vocabulary, rules and chat template of a model's tokenizer."""
    tokenizer = models.load_tokenizer(model)
    told = [models.tokenizer_fingerprint(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(dumps(told).encode()).hexdigest()


def text_of(model: str) -> str:
    """64 hex digits over what stands between text and a model: tokenizer, chat template, and the tokens that its
    generation settings end an answer at; empty for a hub id, and for a folder without a tokenizer."""
    if not Path(models.resolve(model)).is_dir():
        return ""
    base = models.base_and_adapter(model, "")[0] or model
    told = _read(Path(models.resolve(base)) / "generation_config.json")
    try:
        return hashlib.sha256(dumps([tokenizer_hash(model), (told or {}).get("eos_token_id")]).encode()).hexdigest()
    except InputError:  # which loading says better
        return ""


def hashes_of(model: str) -> dict[str, str]:
    """All that a run of a model depends on beside its name: weights, settings, and how text becomes its tokens."""
    return {
        "model_sha256": models.weights_of(model),
        "model_config_sha256": config_of(model),
        "text_sha256": text_of(model),
    }


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
