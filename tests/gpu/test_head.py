"""The head as it runs on a GPU against plain log-softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankalign.rows import head_wide
from rankalign.rows.head import Head, label_logps


def case(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, b, slope = (torch.randn(*shape, dtype=dtype) for shape in ((37, 16), (1000, 16), (1000,), (37,)))
    return hidden, weight, b if bias else None, torch.randint(0, 1000, (37,)), slope


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("budget", "positions"), [(1 << 30, 1 << 20), (4 * 37 * 300, 20)])
def test_values_and_gradients(
    scale: float, cap: float | None, bias: bool, budget: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_wide, "BUDGET", budget)
    monkeypatch.setattr(head_wide, "POSITIONS", positions)
    hidden, weight, b, labels, slope = case(bias)
    host = [t if t is None else t.clone().requires_grad_() for t in (hidden, weight, b)]
    device = [t if t is None else t.to("cuda").requires_grad_() for t in (hidden, weight, b)]
    z = host[0] @ host[1].t() + (host[2] if bias else 0)
    z = z * scale if cap is None else cap * torch.tanh(z * scale / cap)
    expected = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    got = label_logps(Head(device[1], device[2], scale, cap), device[0], labels.to("cuda"))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-11, atol=1e-11)
    (expected * slope).sum().backward()
    (got * slope.to("cuda")).sum().backward()
    for a, e in zip(device, host, strict=True):
        if e is not None:
            torch.testing.assert_close(a.grad.cpu(), e.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("weights", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_nothing_waits_and_products_are_of_half_precision(weights: torch.dtype, autocast: bool, watch: Any) -> None:
    hidden, weight, _, labels, _ = case(False, torch.float32)
    h, w = (t.to("cuda", weights).requires_grad_() for t in (hidden, weight))
    y = labels.to("cuda")
    with watch() as log:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            out = label_logps(Head(w), h, y)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert not log.waits
    assert not log.uploads
    assert {kind for name, kind, _ in log.kernels if name.startswith("aten::mm")} == {"bfloat16"}


def test_launches_follow_the_tiles_and_not_the_labels(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tiles as 3,072 labels of Qwen2.5-0.5B's 151,936 entries have, at a 64th of both."""
    monkeypatch.setattr(head_wide, "BUDGET", head_wide.BUDGET // 64**2 + 4 * 48 * 256)
    h = torch.randn(48, 8, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(2374, 8, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.zeros(48, dtype=torch.long, device="cuda")
    assert len(list(head_wide._tiles(Head(w), len(h), h.dtype))) >= 3
    with watch() as log:
        label_logps(Head(w), h, labels).sum().backward()
    assert not log.waits
    assert len(log.kernels) <= 200
