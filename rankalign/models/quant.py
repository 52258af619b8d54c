"""Eight-bit weights for inference, on any device: one byte a weight, and a scale for every 64 of them.

Absmax rounding (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1, by groups of a row in place of its
outlier columns; activations stay as they are): a weight w becomes round(127 w / max |group|), so none is off by more
than half a step of its group. Embeddings are stored so too, a fifth of the default model. What is computed is what the
rounded weights say in the type of the activations: a block of rows is widened, used and forgotten.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BLOCK = 1 << 20
"""Weights widened at once: 4 MB in float32, which stay in a processor's cache."""
BLOCK_ON_GPU = 1 << 26
"""There a launch costs more than the memory: 256 MB, one block for every matrix of an 8B model but its head."""


GROUP = 64
"""Weights of a row that share a scale, where its length allows. With one for a whole row, the default model's logits
are four times as far off (1 - cosine 0.0023 in place of 0.0006)."""


class Int8Rows(nn.Module):
    """A matrix of eight-bit weights.

    Args:
        matrix: (R, C), any floating type.

    Attributes:
        weight: (R, C) int8.
        scale: (R, C / group) float32; each times its group of ``weight`` is the matrix, rounded.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        count, width = matrix.shape
        group = math.gcd(width, GROUP)
        weight = torch.empty(count, width, dtype=torch.int8, device=matrix.device)
        # Widths that have no such divisor get one scale a row: many small groups would outweigh what they save.
        scale = torch.empty(count, width // group if group >= 16 else 1, device=matrix.device, dtype=torch.float32)
        for rows in _blocks(matrix):
            wide = matrix[rows].float().reshape(-1, scale.shape[1], width // scale.shape[1])
            # A group of zeros gets a scale above 0, by which it can be divided.
            scale[rows] = wide.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
            weight[rows] = (wide / scale[rows].unsqueeze(-1)).round().flatten(1).to(torch.int8)
        # Parameters, because a move to another device keeps the tie between two modules that share them.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def rows(self, which: Tensor | slice) -> Tensor:
        """The chosen rows, (..., C) float32."""
        scale = self.scale[which].unsqueeze(-1)
        return (self.weight[which].reshape(*scale.shape[:-1], -1) * scale).flatten(-2)


class Int8Linear(nn.Module):
    """A linear layer over eight-bit rows: y = x W^T + b in the type of x."""

    def __init__(self, matrix: Int8Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R)."""
        # Never the whole matrix at full width.
        parts = [nn.functional.linear(x, self.matrix.rows(r).to(x.dtype)) for r in _blocks(self.matrix.weight)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """An embedding over eight-bit rows, in the type that the model computes in."""

    def __init__(self, matrix: Int8Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids to (..., C)."""
        return self.matrix.rows(ids).to(self.dtype)


def quantize_8bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the weights of linear layers and embeddings eight-bit, in place; the others become ``dtype``.

    Tied matrices stay one. Adapters (what peft names ``lora_``) and layers of a kind of their own, such as fused
    experts or embeddings that scale, keep their width.

    Args:
        model: a model for inference; it cannot be trained or saved afterwards.
        dtype: what the model computes in.
    """
    made: dict[int, Int8Rows] = {}
    # All old layers stay alive until the end: an address must not be given to another matrix meanwhile.
    places = [
        (parent, *found) for path, parent in model.named_modules() if "lora_" not in path for found in _found(parent)
    ]
    for parent, name, layer, matrix in places:
        if matrix.data_ptr() not in made:
            made[matrix.data_ptr()] = Int8Rows(matrix.detach())
        setattr(parent, name, _replacement(layer, made[matrix.data_ptr()], dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point() and not _is_scale(parameter, made):
            parameter.data = parameter.data.to(dtype)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model in memory; tied ones count once."""
    found = {w.data_ptr(): w.nbytes for w in [*model.parameters(), *model.buffers()]}
    return sum(found.values())


def _blocks(matrix: Tensor) -> list[slice]:
    """The rows of a matrix in blocks of about BLOCK weights, on a GPU of BLOCK_ON_GPU."""
    step = max(1, (BLOCK_ON_GPU if matrix.is_cuda else BLOCK) // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def _found(parent: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, layer and (outputs or tokens, inputs) weights of the children that can be eight-bit."""
    found: list[tuple[str, Any]] = list(parent.named_children())
    kinds: set[type] = {nn.Linear, Conv1D, nn.Embedding}
    if hasattr(parent, "lora_embedding_A"):  # it reads more of its embedding than the weights
        kinds.remove(nn.Embedding)
    return [
        (name, layer, layer.weight.t() if type(layer) is Conv1D else layer.weight)
        for name, layer in found
        if type(layer) in kinds
    ]


def _replacement(old: Any, rows: Int8Rows, dtype: torch.dtype) -> nn.Module:
    if isinstance(old, nn.Embedding):
        return Int8Embedding(rows, dtype)
    return Int8Linear(rows, old.bias)


def _is_scale(parameter: Tensor, made: dict[int, Int8Rows]) -> bool:
    return any(parameter is rows.scale for rows in made.values())
