"""An adapter folded into its base: a plain model that loads without peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import saving
from rankalign.storage.folders import new_folder

PROBE = 16
"""Tokens, spread over the vocabulary, on which the sum must say what base and adapter say."""
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Mean difference of an output, as a share of the mean output, that rounding the summed weights explains."""


def merge_lora(folder: str, output: str) -> None:
    """Fold an adapter into its base and save the sum as a plain model with its tokenizer.

    Where the adapter moves input embeddings and output head apart that share their weights in the base, each gets
    weights of its own, and the configuration says so.

    Args:
        folder: the adapter's folder; its ``adapter_config.json`` names the base.
        output: folder to make; an existing one is never overwritten.

    Raises:
        InputError: there is no adapter, or the sum does not compute what base and adapter compute.
    """
    if not models.is_adapter(folder):
        raise InputError(f"{folder}: no such folder with an adapter_config.json")
    adapted = _adapted(folder)
    expected = _outputs(adapted)  # before anything is taken apart
    tied = _untie(adapted.get_base_model())
    with warnings.catch_warnings():
        # The weights that they are about are untied by now.
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`|Input and output embeddings")
        merged = adapted.merge_and_unload()
    if tied:
        _tie_again(merged)
    gap = float((_outputs(merged) - expected).abs().mean() / expected.abs().mean())
    if not gap <= ROUNDING[merged.dtype]:  # NaN is refused, too
        raise InputError(f"{folder}: merged, its outputs are off by {gap:.1%} of their size; use it as an adapter")
    with new_folder(Path(output)) as fresh:
        merged.save_pretrained(fresh)
        models.load_tokenizer(folder).save_pretrained(fresh)
        saving.finish(fresh)


def _adapted(folder: str) -> Any:
    """Base and adapter, in the type of the base's file, of the kind that the adapter was trained for."""
    where, adapter = models.base_and_adapter(folder, "")
    task = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("task_type")
    if task == "SEQ_CLS":
        base, _ = models.load_as(AutoModelForSequenceClassification, where, "auto", num_labels=1)
    else:
        base = models.load_whole_policy(where, "auto")
    return models.with_adapter(base, adapter).eval()


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """Logits, or the reward, of a few tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, PROBE).long()[None]
    outputs: Tensor = model(input_ids=ids, use_cache=False).logits
    return outputs.double()


def _untie(model: Any) -> bool:
    """Give the output head a copy of the weights that it shares with the input embeddings; whether it shared them."""
    read, write = _bare(model.get_input_embeddings()), _bare(model.get_output_embeddings())
    if write is None or read.weight is not write.weight:
        return False
    write.weight = nn.Parameter(write.weight.detach().clone(), requires_grad=False)
    return True


def _bare(layer: Any) -> Any:
    """The base's own layer inside whatever peft has put around it."""
    while layer is not None:
        inner = getattr(layer, "original_module", None) or getattr(layer, "base_layer", None)
        if inner is None:
            break
        layer = inner
    return layer


def _tie_again(model: Any) -> None:
    """Share the weights of input embeddings and output head again where the merge has left them equal."""
    read, write = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(read.weight, write.weight)
    if equal:
        write.weight = read.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal
