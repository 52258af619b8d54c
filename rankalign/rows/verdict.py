"""What is known of a model's make, by what it has been proven and where that is kept.

A proof depends on the configuration and on code alone, never on weights. It is kept with the model, for the process,
and, for classes of transformers, in a file, under a key of all that it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from rankalign.errors import InputError
from rankalign.rows.own import trunk_of
from rankalign.rows.proof import Verdict, prove
from rankalign.rows.shrink import class_of
from rankalign.rows.trunk import NEITHER
from rankalign.storage.files import atomic_writer, cache_dir

_VERDICT = "_rankalign_trees"
_proven: dict[tuple[Any, str], Verdict] = {}


def verdict_of(lm: Any) -> Verdict:
    """How rows of trees may be laid out for a model, proven the first time that its make is met.

    Args:
        lm: a transformers model; its weights may lie anywhere, or nowhere.
    """
    kept: Verdict | None = vars(lm).get(_VERDICT)
    if kept is None:
        kept = _verdict(lm)
        setattr(lm, _VERDICT, kept)
    return kept


def _verdict(lm: Any) -> Verdict:
    trunk = trunk_of(lm)
    if not isinstance(trunk, transformers.PreTrainedModel):
        return Verdict(NEITHER, "it has no trunk of transformers")
    kind, config = class_of(trunk), trunk.config
    if getattr(config, "reorder_and_upcast_attn", False):  # of GPT-2, where the type matters and the form does not
        return Verdict(NEITHER, "its attention computes in float32 (reorder_and_upcast_attn), which rows would not")
    key = kind, _fingerprint(kind, config)
    if key not in _proven:
        own = kind.__module__.startswith("transformers.")
        found = _read(key[1]) if own else None
        _proven[key] = found or prove(kind, config)
        if own and found is None:
            _write(key[1], _proven[key])
    return _proven[key]


def _fingerprint(kind: Any, config: Any) -> str:
    """Of all that a proof depends on."""
    settings = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        settings.pop(name, None)
    parts = [f"{kind.__module__}.{kind.__qualname__}", _code(), json.dumps(settings, sort_keys=True, default=str)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Versions of the libraries, and a digest of the code in this room."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"{transformers.__version__} {torch.__version__} {digest.hexdigest()}"


def _place(key: str) -> Path:
    return cache_dir() / "trees" / f"{key}.json"


def _read(key: str) -> Verdict | None:
    try:
        return Verdict(**json.loads(_place(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or a damaged one: proven anew
        return None


def _write(key: str, verdict: Verdict) -> None:
    try:
        with atomic_writer(_place(key)) as stream:
            stream.write(json.dumps(asdict(verdict)).encode())
    except InputError as error:  # also where another process has just written the same
        if not _place(key).exists():
            print(f"warning: what is known of tree rows cannot be kept: {error}", file=sys.stderr)
