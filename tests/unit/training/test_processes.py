"""Which launches leave a process with a part of the weights alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rankalign.errors import InputError
from rankalign.training import processes


def asked(monkeypatch: pytest.MonkeyPatch, count: int, fsdp: int, stage: int) -> Any:
    """Settings of a launch: of so many processes, by an FSDP of this version, and by DeepSpeed of this stage."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(num_processes=count))
    plugin = SimpleNamespace(zero_stage=stage) if stage else None
    return SimpleNamespace(fsdp_plugin_args={"fsdp_version": fsdp} if fsdp else None, deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    ("count", "fsdp", "stage", "spread"),
    [(2, 0, 0, False), (2, 2, 0, True), (1, 2, 0, False), (2, 0, 2, False), (2, 0, 3, True), (1, 0, 3, False)],
)
def test_who_holds_a_part(monkeypatch: pytest.MonkeyPatch, count: int, fsdp: int, stage: int, spread: bool) -> None:
    assert processes.spreads_weights(asked(monkeypatch, count, fsdp, stage)) == spread


def test_the_launcher_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = asked(monkeypatch, 2, 0, 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert processes.spreads_weights(settings)


def test_flat_weights_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="FSDP's first version"):
        processes.spreads_weights(asked(monkeypatch, 2, 1, 0))
    assert not processes.spreads_weights(asked(monkeypatch, 1, 1, 0))
