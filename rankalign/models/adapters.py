"""Low-rank adapters put on a model for training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankalign.errors import InputError
from rankalign.registry import did_you_mean


def add_lora(
    model: PreTrainedModel,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    targets: str | Sequence[str] = "auto",
    dora: bool = False,
    parameters: Sequence[str] = (),
) -> Any:
    """Put trainable low-rank adapters on a model and freeze the rest; says on stderr how many weights train.

    Args:
        model: a causal language model or a sequence classifier.
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        dropout: on the adapter's input.
        targets: names of the layers to adapt; ``auto`` is every linear layer but the output head.
        dora: also learn the length of each weight column (DoRA, arXiv:2402.09353).
        parameters: names of weights to adapt that are no layer by themselves, as those of experts.

    Returns:
        The ``PeftModel``; under ``model.disable_adapter()`` it computes what the base does.

    Raises:
        InputError: peft knows no adapter for one of the layers.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if targets != "auto":
        check_targets(model, targets)
    check_parameters(model, parameters, dropout, dora)
    # peft then trains and saves the head as well.
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if targets == "auto" else list(targets),
        exclude_modules=_with_a_way_of_their_own(model) or None,
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        use_dora=dora,
        target_parameters=list(parameters) or None,
    )
    named: Any = model
    if Path(named.name_or_path).is_dir():  # the adapter names its base, and must find it from any folder
        named.name_or_path = str(Path(named.name_or_path).absolute())
    try:
        return say_trainable(get_peft_model(model, config))
    except ValueError as error:
        raise InputError(f"no adapter fits: {error} (name other layers in --lora_target_modules)") from None


def check_targets(model: Any, targets: Sequence[str]) -> None:
    """Refuse a name that no layer of the model ends in: peft adapts the others without a word.

    Raises:
        InputError: naming it, and the nearest name that the model has.
    """
    known = {name.split(".")[-1] for name, module in model.named_modules() if not list(module.children())}
    full = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in full):
            raise InputError(f"--lora_target_modules: no layer is named {target!r}{did_you_mean(target, known)}")


@torch.no_grad()
def _with_a_way_of_their_own(model: Any) -> list[str]:
    """Linear layers that give more than a product, as Llama 4's routers do; peft would take them for plain ones."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
        and not isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)
    ]


def check_parameters(model: Any, names: Sequence[str], dropout: float, dora: bool) -> None:
    """Refuse a weight that the model does not have, and what peft cannot do with weights that are no layer.

    Raises:
        InputError: naming it, and the nearest name that the model has.
    """
    if not names:
        return
    known = [name for name, _ in model.named_parameters()]
    for name in names:
        if not any(own == name or own.endswith(f".{name}") for own in known):
            near = did_you_mean(name.split(".")[-1], {own.split(".")[-1] for own in known})
            raise InputError(f"--lora_target_parameters: no weight is named {name!r}{near}")
    if dropout or dora:
        what = "--lora_dropout" if dropout else "--use_dora"
        raise InputError(f"--lora_target_parameters: peft adapts such weights without {what}: leave it out")


def say_trainable(adapted: Any) -> Any:
    """Print on stderr how many weights of a ``PeftModel`` train, and return it."""
    trainable, total = adapted.get_nb_trainable_parameters()
    print(f"LoRA: {trainable:,} of {total:,} weights train ({trainable / total:.2%})", file=sys.stderr)
    return adapted
