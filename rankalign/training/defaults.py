"""What a run takes where nobody says otherwise: a learning rate by loss and method, and what a GPU is good at.

Each choice is noted with its reason, and all are shown at the start of a run; a flag or the YAML file overrides any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_torch_tf32_available

from rankalign.losses.mixtures import parse
from rankalign.models import devices

# Peak rates for all weights, of the papers named in docs/losses.md. What pulls log-probabilities of whole answers apart
# takes small ones: at the rates of likelihood training, losses of pairs drive both answers of a pair down.
PREFERENCE = 1e-6
RATES = {
    "rrhf": 2e-5, "sft": 2e-5, "raft": 2e-5,  # likelihood terms, by RRHF, Alpaca and RAFT
    "slic_hf": 1e-5, "orpo": 8e-6, "pro": 5e-6,  # a likelihood term beside a preference
    "sppo": 5e-7, "sigmoid_norm": 5e-7,
}  # fmt: skip
REWARD = 1e-5  # Llama 2, 3.2.2
# An adapter of any rank wants about ten times the rate of all weights (Schulman et al., LoRA Without Regret, 2025);
# QLoRA has 2e-4 where Alpaca has 2e-5.
LORA = 10


class Choice(NamedTuple):
    """A setting that nobody gave: its name, what it is, and why."""

    name: str
    value: Any
    why: str


def learning_rate(method: str, loss: str, lora: bool) -> Choice:
    """The peak learning rate; of a mixture the smallest of its losses'.

    Args:
        method: rank, sft or reward.
        loss: a loss or a mixture.
        lora: whether an adapter trains, and not all weights.
    """
    full = REWARD if method == "reward" else min(RATES.get(name, PREFERENCE) for name in parse(loss))
    what = f"{'reward' if method == 'reward' else loss}, {'LoRA' if lora else 'full'}"
    return Choice("learning_rate", float(f"{full * (LORA if lora else 1):.3g}"), what)


def choose(config: Any) -> list[Choice]:
    """Fill in what was left open, before transformers looks at the settings; and say what and why.

    Args:
        config: a TrainConfig whose ``learning_rate``, ``bf16`` and ``tf32`` are None where nobody gave them.
    """
    found: list[Choice] = []
    if config.learning_rate is None:
        found.append(learning_rate(config.method, config.loss, config.use_lora))
    if config.bf16 is None:
        found += _bf16(config)
    for choice in found:
        setattr(config, choice.name, choice.value)
    config.bf16 = bool(config.bf16)
    # Behind bf16, whose products have fewer digits still: of a run in float32 somebody wants the digits.
    if config.tf32 is None and config.bf16 and devices.device().type == "cuda" and is_torch_tf32_available():
        config.tf32 = True
        found.append(Choice("tf32", True, "what stays in float32 under bf16; scores and sums keep all digits"))
    return found


def _bf16(config: Any) -> list[Choice]:
    """Mixed precision, on a GPU that has it in hardware. float16, whose sums overflow, is never taken by itself."""
    if devices.device().type != "cuda" or config.fp16 or _asked_of_launcher(config):
        return []
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return [Choice("bf16", True, "this GPU has it; weights that train stay float32")]
    return [Choice("bf16", False, "this GPU has no bfloat16; --fp16 is there to be asked for")]


def _asked_of_launcher(config: Any) -> bool:
    """Whether a launcher or DeepSpeed's file says what the precision is."""
    sharded = config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes")
    return bool(sharded) or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") not in ("", "no")


def say(config: Any, more: Sequence[Choice] = ()) -> None:
    """Show in one block on stderr what was chosen, and what a choice of the user's costs; nothing where nothing was.

    Args:
        config: the settings.
        more: chosen since they were read.
    """
    choices = [*config.chosen, *more]
    if choices:
        print("chosen, since no flag and no file says otherwise:", file=sys.stderr)
    for name, value, why in choices:
        print(f"  {name} {f'{value:g}' if isinstance(value, float) else value} ({why})", file=sys.stderr)
    if config.dtype == "bfloat16" and not config.use_lora and not config.compensated:
        why = "updates below a 256th of a weight are rounded away, in part or whole"
        print(f"--dtype bfloat16: {why}; --optim stable_adamw keeps them", file=sys.stderr)
