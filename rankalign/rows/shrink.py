"""A small model of the same make: few layers, one of every kind, few heads and words, random weights, float64.

What depends on lengths (windows, chunks, keys picked, thresholds of positions) is made so short that a few tokens reach
beyond it.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

WORDS = 32  # in the vocabulary of a small model
REACH = 5  # tokens of a window, a chunk, ...
MOST = 60_000_000  # weights that are still made
_WIDE, _EXPERTS, _HEAD = 48, 8, 32  # between the two products of an MLP; experts, and numbers of a head, at most

_LENGTHS = re.compile(r"window|chunk|index_topk|floor_scale|original_max_position|local_attention|block_len")
_NOT_LENGTHS = re.compile(r"layers|pattern|head|dim")
_INNER = re.compile(r"intermediate|ffn|inner|d_ff")
_SIZES = re.compile(r"(hidden|model|embd|embed|lru|emb)\w*(_size|_dim)?$|^d_model$|width")


class TooLarge(ValueError):
    """The smallest copy that can be made has too many weights."""


def class_of(module: nn.Module) -> Any:
    """The class that a module was made of, also where FSDP2 has put one of its own in front."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def small_configs(config: Any) -> Iterator[Any]:
    """Configurations of the same make, the smallest first; some may not go together, and then the next one is tried."""
    for most in (_HEAD, sys.maxsize, 0):
        found = copy.deepcopy(config)
        for part in _parts(found):
            _shrink(part, most)
            # The kernels that a CPU has for float64.
            part._attn_implementation, part._experts_implementation = None, "eager"
        yield found


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _shrink(config: Any, most: int) -> None:
    """Make all small, with heads of ``most`` numbers at most; for 0 heads stay as they are, and as many."""
    values = vars(config)
    values.pop("quantization_config", None)
    old = {name: _number(config, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    for name, value in list(values.items()):
        new = _small(name, value)
        if new is not value:
            setattr(config, name, new)
    _fewer_experts(config)
    if most:
        _fewer_heads(config, most, *old.values())


def _small(name: str, value: Any) -> Any:
    """What a setting becomes that has nothing to do with the width of the model."""
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        own = value if all(isinstance(part, dict) for part in value.values()) else {"": value}
        # These are of positions that depend on the longest text; how far they reach is looked after elsewhere.
        if any(part and str(part.get("rope_type")) in ("dynamic", "longrope") for part in own.values()):
            return value
        return {key: _small(name if isinstance(part, dict) else key, part) for key, part in value.items()}
    if isinstance(value, list) and _INNER.search(name):
        return [_small(name, part) for part in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.startswith("vocab_size"):
        return min(value, WORDS)
    if re.search(r"token_(id|index)$", name):
        return value if value < WORDS else 0
    if name == "block_size":  # BigBird attends to all of a text that has few blocks
        return min(value, 2)
    if _LENGTHS.search(name) and not _NOT_LENGTHS.search(name):
        return min(value, REACH)
    if (_INNER.search(name) and "layer" not in name) or name == "hidden_size_per_layer_input":
        return min(value, _WIDE)
    return value


def _number(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name)
    except Exception:  # some have one a layer, and say so in ways of their own
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _fewer_experts(config: Any) -> None:
    chosen = max((_number(config, name) or 0 for name in ("num_experts_per_tok", "moe_topk", "top_k")), default=0)
    least = max(_EXPERTS, 2 * chosen, 2 * (_number(config, "n_group") or 0))
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if (_number(config, name) or 0) > least:
            setattr(config, name, least)


def _fewer_heads(config: Any, most: int, hidden: int | None, heads: int | None, key_heads: int | None) -> None:
    """As many query heads to a key head as there were, up to two, and as much hidden state to a head, up to most."""
    if not hidden or not heads or hidden % heads:
        return
    groups = heads // key_heads if key_heads and heads % key_heads == 0 else 1
    fewer_keys = min(key_heads or heads, 2)
    fewer = fewer_keys * min(groups, 2)
    each = min(hidden // heads, most)
    if fewer * each >= hidden:
        return
    config.num_attention_heads, config.hidden_size = fewer, fewer * each
    for name in ("head_dim", "global_head_dim"):
        if (_number(config, name) or 0) > most:
            setattr(config, name, most)
    if key_heads:
        config.num_key_value_heads = fewer_keys
    for name, value in list(vars(config).items()):
        if value == hidden and isinstance(value, int) and _SIZES.search(name) and name != "hidden_size":
            setattr(config, name, config.hidden_size)


# --- layers ------------------------------------------------------------------------------------------------------


def few_layers(kind: Any, config: Any) -> Any:
    """The configuration with the first layers alone, as many as have all kinds of layers among them; two at least."""
    depth = _number(config, "num_hidden_layers")
    if depth is None or depth <= 2:
        return config
    with torch.device("meta"):
        whole = kind(copy.deepcopy(config))
    enough = _first_of_all(whole, depth)
    if enough >= depth:
        return config
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers = enough
    for name, value in list(vars(fewer).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(fewer, name, value[:enough])
    shared = _number(config, "num_kv_shared_layers")  # the last layers, which take keys of earlier ones
    if shared:
        fewer.num_kv_shared_layers = max(enough - (depth - shared), 0)
    try:
        with torch.device("meta"):
            made = kind(copy.deepcopy(fewer))
    except Exception:  # whatever a configuration that is told by depth makes of another one
        return config
    return fewer if _kinds(made) == _kinds(whole) else config


def _kinds(model: nn.Module) -> set[Any]:
    """What modules a model is made of, whatever their number."""
    return {_kind(name, module) for name, module in model.named_modules()}


def _first_of_all(model: nn.Module, depth: int) -> int:
    """How many layers, from the first on, have one of every kind among them."""
    by_layer: dict[int, set[Any]] = {}
    for name, module in model.named_modules():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if number and int(number[1]) < depth:
            by_layer.setdefault(int(number[1]), set()).add(_kind(name, module))
    everything = set[Any]().union(*by_layer.values())
    seen = set[Any]()
    for layer in sorted(by_layer):
        seen |= by_layer[layer]
        if seen == everything:
            return max(layer + 1, 2)
    return depth


def _kind(name: str, module: nn.Module) -> Any:
    """Where a module stands, less the number of its layer, what it is and how it is set."""
    settings = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | str | int | None) and key not in ("layer_idx", "layer_id", "training")
    }
    return re.sub(r"\d+", "*", name), type(module).__name__, tuple(sorted(settings.items(), key=lambda pair: pair[0]))


# --- weights -----------------------------------------------------------------------------------------------------


def build(kind: Any, config: Any) -> Any:
    """A model with random weights in float64, so large that every part of it shows.

    Raises:
        TooLarge: it would have more than ``MOST`` weights.
    """
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise TooLarge(f"a copy of few layers would still have {size:,} weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(config).double().eval()
        # Norms, biases, gates and sinks start at constants, under which mistakes would not show.
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=weight.shape[-1] ** -0.5)
                else:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
    return model
