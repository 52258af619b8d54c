"""From the host to the device: all that a row needs in one copy, which the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_ALIGNED = 16  # bytes; a view of the buffer under another type must start at a multiple of that type's size


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The same tensors on a device.

    For a GPU they go through one page-locked buffer in one asynchronous copy. From pageable memory each would be a
    copy of its own, and the host would wait in each until the device has done all that came before.

    Args:
        device: where they are wanted.
        *tensors: on the host, or there already.
    """
    if device.type != "cuda" or any(isinstance(tensor, FakeTensor) for tensor in tensors):  # a plan has no memory
        return [tensor.to(device) for tensor in tensors]
    here = [tensor for tensor in tensors if tensor.device != device]
    if not here:
        return list(tensors)
    ends = [0]
    for tensor in here:
        ends.append(-(-(ends[-1] + tensor.numel() * tensor.element_size()) // _ALIGNED) * _ALIGNED)
    # The allocator gives the block to nobody else before the copy is done, though we let go of it at once.
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    for tensor, start in zip(here, ends, strict=False):
        _part(buffer, start, tensor).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    sent = iter([_part(there, start, tensor) for tensor, start in zip(here, ends, strict=False)])
    return [next(sent) if tensor.device != device else tensor for tensor in tensors]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The piece of a buffer of bytes that holds a tensor of this type and shape."""
    size = like.numel() * like.element_size()
    return buffer[start : start + size].view(like.dtype).view(like.shape)
