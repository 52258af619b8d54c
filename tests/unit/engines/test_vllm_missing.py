"""Engine ``vllm`` where vLLM is not installed; what it does where it is stands in ``tests/vllm``."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rankalign.engines import ENGINES, Policy, SamplingParams
from rankalign.errors import InputError


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"^engine 'vllm' needs: pip install 'rankalign\[vllm\]'$"):
        ENGINES.load("vllm")(Policy("me", "vllm"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"num_beams": 4}, "searches no beams; use engine hf"), ({"temperature": 0.005}, "temperatures below 0.01")],
)
def test_settings_that_vllm_cannot_follow(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"policy 'me': engine 'vllm' .*{reason}"):
        ENGINES.load("vllm")(Policy("me", "vllm", sampling=SamplingParams(**settings)))
