"""A tiny token classifier in a folder, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForTokenClassification

from rankalign.models import tiny


def token_classifier(folder: Path, labels: int = 1) -> str:
    """The tiny policy's trunk with a token head of its own; returns the folder."""
    torch.manual_seed(3)
    config = tiny.build_model().config
    config.num_labels = labels
    model = LlamaForTokenClassification(config)
    torch.nn.init.normal_(model.score.weight)
    target = folder / f"prm-{labels}"
    model.save_pretrained(target)
    tiny.build_tokenizer().save_pretrained(target)
    return str(target)
