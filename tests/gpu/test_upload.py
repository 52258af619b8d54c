"""What goes to a device in one piece, and conditions that wait until somebody asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankalign.rows.checks import Checks
from rankalign.rows.upload import to_device

CUDA = torch.device("cuda", 0)


def test_tensors_of_all_types_and_shapes_arrive_as_they_were() -> None:
    tensors = [
        torch.arange(5).to(torch.int32), torch.tensor([True, False, True]), torch.randn(3, 2, dtype=torch.float64),
        torch.zeros(0, dtype=torch.long), torch.randn(7).bfloat16(), torch.arange(12).view(3, 4).t(), torch.tensor(4),
    ]  # fmt: skip
    sent = to_device(CUDA, *tensors)
    for there, here in zip(sent, tensors, strict=True):
        assert (there.device, there.dtype, there.shape) == (CUDA, here.dtype, here.shape)
        assert torch.equal(there.cpu(), here)


def test_they_go_in_one_copy_that_nobody_waits_for(watch: Any) -> None:
    with watch() as log:
        there = to_device(CUDA, torch.arange(5), torch.randn(3))
        again = to_device(CUDA, *there)
    assert len(log.uploads) == 1
    assert not log.slow_uploads
    assert not log.waits
    assert all(a is b for a, b in zip(there, again, strict=True))
    with watch() as log:
        torch.arange(5).to(CUDA, non_blocking=True)  # from pageable memory the host waits all the same
    assert len(log.slow_uploads) == 1


def test_conditions_wait_and_the_first_that_fails_is_raised(watch: Any) -> None:
    checks = Checks()
    with watch() as log:
        for name, fine in (("a", [True]), ("b", [True, False]), ("c", [False])):
            checks.require(torch.tensor(fine).to(CUDA), lambda found, name=name: ValueError(f"{name} {found}"))
    assert not log.waits
    with watch() as log, pytest.raises(ValueError, match=r"b \[True, False\]"):
        checks.settle()
    assert len(log.waits) == 1
    checks.settle()
