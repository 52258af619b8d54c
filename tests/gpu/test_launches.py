"""What a step launches, waits for and uploads on a GPU, on the pretended one, which notes all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rankalign.rows import flex, recipes
from rankalign.rows.logps import list_logps
from tests.gpu.models import FAMILIES, build

FLOAT_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")
MODES = ("autocast", "bfloat16")


@pytest.fixture(params=["small rows", "large rows"])
def every_size(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows below and above the size from which on rows are left out and activations are computed again."""
    monkeypatch.setattr(recipes, "BY_HOST", 0 if request.param == "large rows" else 2**62)


@pytest.fixture(autouse=True)
def compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card FlexAttention runs by hundreds of operations; what is around its one kernel is what counts."""

    def stand_in(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, -q.shape[2] :]

    monkeypatch.setattr(flex, "_compiled", lambda: stand_in)


def texts(prompts: int, answers: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 61, (length,), generator=generator).tolist()

    return [draw(9 + i % 3) for i in range(prompts)], [
        [draw(3 + n % 5) for n in range(answers)] for _ in range(prompts)
    ]


def model_of(name: str, mode: str, **more: Any) -> nn.Module:
    """On the device, and no longer new: what is tried once a model is done."""
    model = build(name, torch.float32, **more).to("cuda")
    model = model.bfloat16() if mode == "bfloat16" else model
    list_logps(model, *texts(1, 2))
    return model


def step(model: nn.Module, mode: str, watch: Any, prompts: int = 8, answers: int = 6, flat: bool = False) -> Any:
    """The log of forward and backward of a loss, flat in half of the answers where asked."""
    slope = torch.ones(prompts, answers, device="cuda")
    slope[:, ::2] = 0.0 if flat else 1.0
    model.zero_grad()  # adding to gradients that are there would be launches of its own
    with watch() as log:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode == "autocast"):
            sums = list_logps(model, *texts(prompts, answers))
        (sums * slope).sum().backward()
    return log


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_launches_of_a_llama_layer(mode: str, flat: bool, watch: Any, every_size: None) -> None:
    """At most 200 forward and backward, and as many for any number of prompts and answers, left out or not."""
    sizes = ((1, 2), (8, 6), (16, 8))
    counts = []
    for layers in (2, 4):
        model = model_of("llama", mode, num_hidden_layers=layers)
        counts.append([len(step(model, mode, watch, *size, flat).kernels) for size in sizes])
    own = {(more - less) / 2 for less, more in zip(*counts, strict=True)}
    assert len(own) == 1
    assert own.pop() <= 200


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_waits_in_layers_and_head_or_is_uploaded_there(
    name: str, mode: str, watch: Any, every_size: None
) -> None:
    uploads = []
    for layers in (2, 4):
        depth: dict[str, Any] = {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
        if name == "gemma3":
            depth["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        model = model_of(name, mode, lora=mode == "autocast", **depth)
        log = step(model, mode, watch, flat=True)
        assert [where.split(":")[0] for _, where in log.waits] == ["rows/tree.py"]  # which answers have a gradient
        uploads.append(len(log.uploads))
    assert uploads[0] == uploads[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_product_is_of_float32(name: str, mode: str, watch: Any) -> None:
    log = step(model_of(name, mode), mode, watch, flat=True)
    wide = [kernel for kernel in log.kernels if kernel[1] == "float32" and kernel[0].startswith(FLOAT_PRODUCTS)]
    assert not [kernel for kernel in wide if not _is_rotary(kernel)]


def _is_rotary(kernel: tuple[str, str, tuple[Any, ...]]) -> bool:
    """Angles are an outer product, of (1, n, 1) and (1, 1, tokens)."""
    return 1 in kernel[2][-1][-2:] or 1 in kernel[2][-2][-2:]
