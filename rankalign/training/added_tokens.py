"""``--add_tokens``: a start model with further special tokens, made once and kept by content."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.storage.folders import cached_folder
from rankalign.training.arguments import TrainConfig
from rankalign.training.settings import ModelSettings


def add_tokens(config: TrainConfig) -> None:
    """Put the model that knows the tokens in the place of ``config.model``; a second call changes nothing."""
    config.model, config.add_tokens = start_model(config.model_settings), ""


def start_model(settings: ModelSettings) -> str:
    """The model to start from: ``settings.model``, or a copy of it that knows the tokens of ``--add_tokens``.

    The copy lies in the cache, named by the weights and tokens that it was made of, so that whatever loads the start
    model later (a resumed run, a reference, a base to compare with) finds the same one.

    Raises:
        InputError: a name is empty or given twice, or with LoRA, whose frozen base would never learn the new rows.
    """
    if not settings.add_tokens:
        return settings.model
    names = [name.strip() for name in settings.add_tokens.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"--add_tokens {settings.add_tokens!r}: give different names with commas between them")
    if settings.use_lora:
        raise InputError(
            "--add_tokens with --use_lora: the rows of new tokens lie in the frozen base and would never be learnt; "
            "train all weights, or start from a model that has the tokens"
        )
    source = models.local_folder(settings.model)
    content = [models.weights_fingerprint(source), models.tokenizer_fingerprint(models.load_tokenizer(settings.model))]
    key = hashlib.sha256("\n".join([*content, *names]).encode()).hexdigest()[:16]
    folder = cached_folder(models.cache_dir() / f"tokens-{key}", lambda fresh: _build(settings.model, names, fresh))
    print(f"start model with {', '.join(names)} added: {folder}", file=sys.stderr)
    return str(folder)


def _build(model: str, names: list[str], folder: Path) -> None:
    """Save the model with the tokens, the first padding token among them in the place of one that only stood in."""
    policy, tokenizer = models.load_policy(model, dtype="float32"), models.load_tokenizer(model)
    stands_in = tokenizer.pad_token in (tokenizer.eos_token, tokenizer.unk_token)
    models.add_tokens(policy, tokenizer, names)
    pad = next((name for name in names if name in models.PAD_NAMES), None)
    if pad and stands_in:
        tokenizer.pad_token = pad
        config: Any = policy.config
        config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
