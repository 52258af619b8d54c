"""What a card can do at most, what a step asks of it, and what else is seen while one runs."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.data import Lists
from benchmarks.results import cpu_name
from rankalign.rows.tree import tree_tokens

# Dense bfloat16 products with float32 sums, TFLOP/s, from the makers' data sheets; where a sheet prints the figure with
# sparsity, half of it. The first pattern that a card's name holds counts, so a special case stands before its kind.
PEAKS = (
    (r"\bGB200\b", 2500.0, "NVIDIA GB200 NVL72 data sheet"),
    (r"\bB200\b", 2250.0, "NVIDIA HGX B200 data sheet"),
    (r"\bH[12]00 NVL\b", 835.5, "NVIDIA H100 NVL and H200 NVL data sheets"),
    (r"\bH100 PCIe\b", 756.5, "NVIDIA H100 PCIe data sheet"),
    (r"\bG?H[12]00\b", 989.4, "NVIDIA H100 SXM and H200 data sheets"),
    (r"\bA[18]00\b", 312.0, "NVIDIA A100 data sheet"),
    (r"\bA40\b", 149.7, "NVIDIA A40 data sheet"),
    (r"\bA30\b", 165.0, "NVIDIA A30 data sheet"),
    (r"\bL40S\b", 362.0, "NVIDIA L40S data sheet"),
    (r"\bL40\b", 181.0, "NVIDIA L40 data sheet"),
    (r"\bL4\b", 121.0, "NVIDIA L4 data sheet"),
    (r"\bRTX A6000\b", 154.8, "NVIDIA RTX A6000, GA102 white paper"),
    (r"\bRTX 3090$", 71.0, "NVIDIA GA102 white paper"),
    (r"\bRTX 4090$", 165.2, "NVIDIA Ada white paper"),
    (r"\bRTX 5090$", 209.5, "NVIDIA RTX Blackwell white paper"),
    (r"\bMI300X\b", 1307.4, "AMD MI300X data sheet"),
)
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "triton", "liger-kernel", "flash-attn")


def peak_of(name: str) -> tuple[float, str] | None:
    """Greatest TFLOP/s of a card by its name, and who says so; None for one that is not in the table."""
    if " MIG " in name:  # a part of a card
        return None
    return next(((peak, source) for pattern, peak, source in PEAKS if re.search(pattern, name)), None)


def is_real(device: torch.device) -> bool:
    """Whether it is a card, and not the one that the tests pretend, whose torch was built without."""
    return device.type == "cuda" and bool(torch.version.cuda or torch.version.hip)


def machine(device: torch.device) -> dict[str, str]:
    """Names and versions of all that figures depend on; ``-`` where there is no such thing."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "-"
    here = {"card": "-", "driver": "-", "memory_gib": "-"}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        here |= {"card": about.name, "memory_gib": f"{about.total_memory / 2**30:.0f}"}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        here["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0].strip() or "?"
    return {**here, "cuda": str(torch.version.cuda or torch.version.hip or "-"), "cpu": cpu_name(), **versions}


def real_tokens(lists: Lists) -> int:
    """Tokens that the data has, each prompt once: the same number however they are laid out, padded or repeated."""
    return sum(len(prompt) + sum(map(len, answers)) for prompt, answers, _ in lists)


def step_operations(model: Any, lists: Lists) -> int:
    """The least operations of a forward and backward over lists.

    6 for each weight of the linear layers and each token that they must see, 6 for each weight of the head and each
    token of an answer (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B), and for each layer, query and key
    that it may see 12 times the width of all heads: two products forward and four backward. What is computed twice
    (prompts, padding, activations, the head's tiles) counts once.
    """
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * size
    head = model.get_output_embeddings().weight
    tables = {id(head), id(model.get_input_embeddings().weight)}
    body = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    tokens = labels = pairs = 0
    for prompt, answers, _ in lists:
        tokens += tree_tokens(len(prompt), [len(a) for a in answers])
        labels += sum(map(len, answers))
        pairs += len(prompt) * (len(prompt) + 1) // 2
        pairs += sum((len(a) - 1) * len(prompt) + (len(a) - 1) * len(a) // 2 for a in answers)  # the last is no query
    return int(6 * body * tokens + 6 * head.numel() * labels + 12 * width * pairs)


def observe(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run a step once, and tell what it gave, how often the host waited, peak memory, and how many graphs it compiled.

    Waits are what torch's own debug mode reports; they and the memory are None where there is no real card.
    """
    compiled = counters["stats"]["unique_graphs"]
    if not is_real(device):
        return {"value": step(), "waits": None, "peak": None, "graphs": counters["stats"]["unique_graphs"] - compiled}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            value = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
    graphs = counters["stats"]["unique_graphs"] - compiled
    return {"value": value, "waits": waits, "peak": torch.cuda.max_memory_allocated(), "graphs": graphs}
