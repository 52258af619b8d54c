"""Root-mean-square norms of a model in one launch on a GPU, where transformers writes them as eight operations.

Norms are a quarter of the launches of a layer, and most of what it computes again in backward. torch's own kernel
computes in float32 inside and rounds once; transformers rounds before it multiplies by the weight, too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

_FUSED = "_rankalign_fused_norms"


def fuse_norms(model: Any) -> None:
    """Let the norms of a model on a GPU run as one kernel from now on, whoever calls it; others stay as they are.

    For good and not for a while, because checkpointing runs layers again after a forward is over.

    Args:
        model: a transformers model, whose adapters stay what they are.
    """
    if model.device.type != "cuda" or vars(model).get(_FUSED):
        return
    module: Any
    for module in model.modules():
        kind: Any = type(module)
        if "forward" not in vars(module) and _is_known(kind):
            module.forward = functools.partial(_forward, module)
    setattr(model, _FUSED, True)


def _forward(module: Any, states: Tensor) -> Tensor:
    weight: Tensor = module.weight
    wide = torch.promote_types(states.dtype, weight.dtype)
    # Autocast would widen the result as well, which transformers leaves in the type of its input.
    with torch.autocast(states.device.type, enabled=False):
        return torch.rms_norm(states.to(wide), (states.shape[-1],), weight.to(wide), module.variance_epsilon)


@functools.cache
def _is_known(kind: type[nn.Module]) -> bool:
    """Whether modules of a class are such norms: by what it is called, and by what it computes of some numbers."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    try:
        norm: Any = kind(16, eps=0.5)  # so large that where it stands shows
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 16))
        states = torch.linspace(-3, 4, 48).sin().view(1, 3, 16)
        ours = torch.rms_norm(states, (16,), norm.weight, norm.variance_epsilon)
        return len(list(norm.parameters())) == 1 and torch.allclose(norm(states), ours, rtol=1e-5, atol=1e-6)
    except (TypeError, AttributeError, RuntimeError):
        return False
