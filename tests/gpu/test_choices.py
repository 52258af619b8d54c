"""Kernels by setting: what they are asked, and in what words they are refused where they cannot run."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import attention

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.rows import flash_varlen, head_liger
from rankalign.rows.head import Head, label_logps
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.e2e.distributed import settings, write_data
from tests.gpu.conftest import REAL

pytestmark = pytest.mark.skipif(REAL, reason="stands in for what a card may have")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    flash_varlen.choose_flash("fa2", True)
    head_liger.choose("ours", True)
    models.stay_on_cpu(False)


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_flash_attention_is_activated_by_torchs_name_and_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("FA3", "FA4"):
        handle = types.SimpleNamespace(remove=lambda name=name: calls.append(f"{name} off"))
        monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, name, lambda h=handle: h)
    card(monkeypatch, (9, 0))
    flash_varlen.choose_flash("fa3", True)
    assert attention.current_flash_attention_impl() == "FA3"
    flash_varlen.choose_flash("fa4", True)
    assert attention.current_flash_attention_impl() == "FA4"
    wide = torch.zeros(1, 2, 4, 192, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(InputError, match="heads of up to 128"):
        flash_varlen.takes_ragged(wide, wide, wide)
    flash_varlen.choose_flash("fa2", True)
    assert attention.current_flash_attention_impl() is None
    assert flash_varlen.takes_ragged(wide, wide, wide)
    assert calls == ["FA3 off", "FA4 off"]


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [
        ("fa3", (8, 0), r"--flash_attention fa3 needs Hopper .*8\.0"),
        ("fa3", (10, 0), r"needs Hopper \(H100, H200\); this card has compute capability 10\.0"),
        ("fa4", (8, 9), "needs Hopper .* or Blackwell"),
        ("fa3", (9, 0), "--flash_attention fa3 is not installed .*hopper"),
        ("fa4", (10, 0), "--flash_attention fa4 is not installed .*pip install flash-attn-4"),
    ],
)
def test_flash_attention_is_refused_with_advice(
    version: str, capability: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, capability)
    with pytest.raises(InputError, match=words):
        flash_varlen.choose_flash(version, True)
    assert attention.current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"flash_attention": "fa5"}, "unknown --flash_attention 'fa5' .*fa2, fa3, fa4"),
        ({"flash_attention": "fa3", "use_cpu": True}, "--flash_attention fa3 runs on GPUs alone"),
        ({"head": "lager"}, "unknown --head 'lager' .*ours, liger"),
        ({"head": "liger"}, r"--head liger needs: pip install 'liger-kernel>=0\.8\.5' \(here is none\)"),
    ],
)
def test_a_run_is_refused_before_it_loads_anything(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=words):
        train(parse_settings(settings(data, tmp_path / "run", **more)))


@pytest.mark.parametrize("version", ["0.8.4", "0.5.10"])
def test_a_liger_that_mixes_gradients_up_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(InputError, match=rf"here is {version}"):
        head_liger.choose("liger", True)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_ligers_head_is_given_what_ours_is(
    scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signature and meaning are those of liger_kernel 0.8.5; its Triton kernel needs a card."""

    def cross_entropy(input, weight, target, bias=None, *, reduction, softcap, accum_dtype) -> Tensor:
        assert (reduction, accum_dtype) == ("none", torch.float32)
        logits = input @ weight.t() + (0 if bias is None else bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    module: Any = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.5")
    torch.manual_seed(0)
    hidden, weight, b = (torch.randn(*s, dtype=torch.float64, device="cuda") for s in ((7, 16), (50, 16), (50,)))
    labels, slope = torch.randint(0, 50, (7,), device="cuda"), torch.randn(7, device="cuda", dtype=torch.float64)
    found = []
    for name in ("ours", "liger"):
        head_liger.choose(name, True)
        leaves = [t.clone().requires_grad_() for t in ((hidden, weight, b) if bias else (hidden, weight))]
        grads: list[Tensor] = []
        logps = label_logps(Head(leaves[1], leaves[2] if bias else None, scale, cap), leaves[0], labels, grads.append)
        (logps * slope).sum().backward()
        assert torch.equal(grads[0].cpu(), slope.cpu())
        found.append([logps.detach(), *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-10, atol=1e-10)
