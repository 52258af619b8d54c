"""fp32 matrix products on CPUs whose vector units torch's default library uses by half.

MKL runs its AVX-512 kernels on Intel's processors alone; on others the same product takes twice the time it takes in
oneDNN, which torch carries as well. Which one runs is a matter of the processor, never of a timing, so that a run can
be repeated to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

SMALLEST = 128**3  # multiplications below which setting oneDNN up costs more than it saves


@cache
def faster() -> bool:
    """Whether this processor gains from oneDNN's products."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    vendor = next((line for line in info.open() if line.startswith("vendor_id")), "") if info.exists() else ""
    return bool(vendor) and "GenuineIntel" not in vendor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of (m, k) and (n, k) tensors; no gradient of its own."""
    large = x.shape[0] * weight.numel() >= SMALLEST
    if large and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and faster():
        kernel: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return kernel(x, weight, bias, "none", [], "")
    return torch_linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of (m, k) and (k, n) tensors with sums in float32 or wider, 16-bit operands included."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.element_size() == 2 else linear(a, b.t())
