"""Conditions that are looked at together, and what goes to a device in one piece."""

from __future__ import annotations

import pytest
import torch

from rankalign.rows.checks import Checks
from rankalign.rows.upload import to_device


def test_on_a_cpu_a_condition_is_looked_at_where_it_is_stated() -> None:
    checks = Checks()
    checks.require(torch.tensor([True, True]), lambda fine: ValueError("no"))
    with pytest.raises(ValueError, match=r"\[True, False\]"):
        checks.require(torch.tensor([True, False]), lambda fine: ValueError(str(fine)))
    checks.settle()  # what was raised is not raised again


def test_on_a_cpu_tensors_go_nowhere() -> None:
    tensors = [torch.arange(3), torch.ones(2, 2), torch.tensor([True])]
    sent = to_device(torch.device("cpu"), *tensors)
    assert all(a is b for a, b in zip(sent, tensors, strict=True))
