"""``torch.compile`` for what every layer does to each token by itself, once for rows of all lengths.

What is compiled is the MLP: two thirds of a layer's weights, and most of what it does beside products. Attention along
trees is a kernel already, and its rows and Python around it would be traced anew for every list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.rows.logps import causal_lm
from rankalign.rows.trunk import COMPILED


def compile_layers(model: nn.Module, backend: str = "inductor", mode: str | None = None) -> int:
    """Have the MLPs of a model compiled when a row first passes, all by one graph.

    Without gradients they run as they are: measurements would take a second graph.

    Args:
        model: bare or inside PEFT.
        backend: of ``torch.compile``.
        mode: of ``torch.compile``.

    Returns:
        How many layers run compiled.

    Raises:
        InputError: the model's layers have no module ``mlp``, or ``mode`` records CUDA graphs, which are of one length.
    """
    if mode in ("reduce-overhead", "max-autotune"):
        raise InputError(f"--torch_compile_mode {mode} records graphs of one length, and no two rows are of one")
    lm: Any = causal_lm(model)
    blocks = [module for name, module in lm.named_modules() if name.rpartition(".")[2] == "mlp"]
    if not blocks:
        raise InputError(f"--torch_compile: the layers of {lm.config.model_type} models have no module `mlp`")
    for block in blocks:
        block.forward = _with_gradient(block.forward, backend, mode)
    setattr(lm, COMPILED, True)
    return len(blocks)


def _with_gradient(plain: Callable[[Tensor], Tensor], backend: str, mode: str | None) -> Callable[[Tensor], Tensor]:
    # Blocks are alike, and torch keeps graphs by code: the second block finds that of the first. A graph that breaks
    # would be several, so it may not.
    compiled = torch.compile(plain, backend=backend, mode=mode, dynamic=True, fullgraph=True)
    return lambda states: compiled(states) if torch.is_grad_enabled() else plain(states)
