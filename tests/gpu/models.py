"""Small models of every family whose rows are trees, with heads of a size that flash kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.numerics.test_logps import FAMILIES as SMALLER
from tests.numerics.test_logps import StayWide, gradients, lists, weigh

__all__ = ["EXPERTS", "FAMILIES", "StayWide", "build", "gradients", "lists", "weigh"]

NAMES = (
    *("llama", "llama-tied", "mistral-window", "qwen2", "qwen2-window", "qwen3", "gemma2", "gemma3"),
    *("gpt2", "gpt_neox", "opt"),
)
WIDER = {"hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32, "head_dim": 8, "query_pre_attn_scalar": 8}
FAMILIES = {
    name: (SMALLER[name][0], SMALLER[name][1] | {key: WIDER[key] for key in WIDER if key in SMALLER[name][1]})
    for name in NAMES
}
FAMILIES["gemma2"][1]["head_dim"] = 16  # the least that FlexAttention compiles for

# Sinks, and values of another size than keys. Which expert a token goes to is asked of the device in every layer.
EXPERTS = {
    "gpt_oss": ("GptOss", SMALLER["gpt_oss"][1] | {"hidden_size": 32, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3", SMALLER["deepseek_v3"][1] | {"hidden_size": 32, "qk_nope_head_dim": 12}),
}


def build(name: str, dtype: torch.dtype = torch.float64, lora: bool = False, **more: Any) -> nn.Module:
    """A model on the CPU with random weights, biases and norms, the same at every call."""
    import transformers

    kind, settings = (FAMILIES | EXPERTS)[name]
    torch.manual_seed(3)
    config = getattr(transformers, kind + "Config")(**settings | more)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    for module in model.modules() if name == "gemma2" else ():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = 1.5
    if lora:
        from rankalign.models.adapters import add_lora

        model = add_lora(model, r=2, alpha=4, dropout=0.0).to(dtype)
    with torch.no_grad():  # biases, norms and adapters start at constants, which would hide mistakes
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model
