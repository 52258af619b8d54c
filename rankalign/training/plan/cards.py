"""Cards by name and models by shape: what `rankalign plan` can plan for without either at hand."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rankalign.errors import InputError
from rankalign.registry import did_you_mean

MIB = 1 << 20
# What the driver says a card holds (nvidia-smi, rocm-smi), which is less than what is printed on it.
CARDS = {
    "t4": 15360 * MIB,
    "l4": 23034 * MIB,
    "a10": 23028 * MIB,
    "3090": 24576 * MIB,
    "4090": 24564 * MIB,
    "5090": 32607 * MIB,
    "a100-40": 40960 * MIB,
    "l40s": 46068 * MIB,
    "a6000": 49140 * MIB,
    "a100": 81920 * MIB,
    "h100": 81559 * MIB,
    "h200": 143771 * MIB,
    "b200": 183359 * MIB,
    "mi300x": 196592 * MIB,
}
CONTEXT = 1024 * MIB  # CUDA's context, cuBLAS' workspaces and NCCL's buffers: some 0.5 to 1 GiB that no tensor shows
SPLIT = 0.05  # of the tensors, what torch's caching allocator may hold in pieces too small for the next one


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {"model_type": "llama", **sizes, "num_attention_heads": heads, **more}


def _qwen(hidden: int, inner: int, layers: int, heads: int, keys: int, tied: bool = False) -> dict[str, Any]:
    vocabulary = 151936 if hidden < 3584 else 152064
    more = {"vocab_size": vocabulary, "num_key_value_heads": keys, "tie_word_embeddings": tied}
    return {**_llama(hidden, inner, layers, heads, **more), "model_type": "qwen2", "max_position_embeddings": 32768}


_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
# From the config.json that each is published with.
SHAPES = {
    "llama-1b": _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, **_LLAMA3),
    "llama-3b": _llama(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True, **_LLAMA3),
    "llama-8b": _llama(4096, 14336, 32, 32, **_LLAMA3),
    "llama-70b": _llama(8192, 28672, 80, 64, **_LLAMA3),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4),
    "qwen2.5-32b": _qwen(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen(8192, 29568, 80, 64, 8),
}


def memory_of(card: str) -> int:
    """Bytes of a card.

    Raises:
        InputError: none of that name is known.
    """
    if card.lower() not in CARDS:
        said = did_you_mean(card.lower(), CARDS)
        raise InputError(f"unknown --device {card!r}{said}; of another card --device_memory 24GiB")
    return CARDS[card.lower()]


def shape(model: str) -> PretrainedConfig | None:
    """The configuration of a model by the name of its shape, or None where that is none of ``SHAPES``."""
    known = SHAPES.get(model.lower())
    if known is None:
        return None
    made: PretrainedConfig = AutoConfig.for_model(**known)
    return made
