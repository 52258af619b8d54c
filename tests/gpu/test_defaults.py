"""What a run chooses by itself on a GPU, says, and lets be overridden."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankalign.models import load as models
from rankalign.rows import wide
from rankalign.rows.logps import precision
from rankalign.training.arguments import parse_settings
from rankalign.training.plan import plan, verdict
from rankalign.training.run import train
from tests.e2e.distributed import settings, write_data

QUIET = {"max_steps": 1, "save_strategy": "no"}


@pytest.fixture(autouse=True)
def _device_again() -> Any:
    yield
    models.stay_on_cpu(False)


def config(tmp_path: Path, **more: Any) -> Any:
    return parse_settings({"model": "tiny", "data": "x.jsonl", "output_dir": str(tmp_path), **more})


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "bf16"),
        ({"method": "reward"}, "bf16"),
        ({"bf16": False}, "float32"),
        ({"fp16": True}, "fp16"),
        ({"use_cpu": True}, "float32"),
    ],
)
def test_bf16_is_on_unless_told_otherwise(more: dict[str, Any], expected: str, tmp_path: Path) -> None:
    made = config(tmp_path, **more)
    assert made.precision == expected
    assert made.own_settings()["bf16"] is (expected == "bf16")  # a resumed run is held to what was chosen
    assert [choice.name for choice in made.chosen if choice.name == "bf16"] == (["bf16"] if expected == "bf16" else [])


def test_an_older_card_computes_in_float32_and_never_in_float16(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    made = config(tmp_path)
    assert made.precision == "float32"
    assert ("bf16", False) in [choice[:2] for choice in made.chosen]


def test_what_a_launcher_says_of_precision_stands(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "bf16" not in [choice.name for choice in config(tmp_path).chosen]


def test_the_choices_are_one_block_at_the_start(tmp_path: Path, capsys: Any) -> None:
    data = write_data(tmp_path / "data.jsonl")
    told = settings(data, tmp_path / "run", loss="dpo", **QUIET)
    train(parse_settings({key: value for key, value in told.items() if key != "learning_rate"}))
    said = capsys.readouterr().err
    block = said[said.index("chosen,") :].splitlines()[:4]
    assert block[1:3] == [
        "  learning_rate 1e-06 (dpo, full)",
        "  bf16 True (this GPU has it; weights that train stay float32)",
    ]
    assert block[3].startswith("  gradient_checkpointing False (no plan could be made")


@pytest.mark.parametrize(("foreseen", "expected"), [(8 << 30, False), (23 << 30, True)])
def test_layers_run_again_where_the_plan_says_so(
    foreseen: int, expected: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    card = SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(verdict, "plan", lambda config, device_memory: {"peak_memory_bytes": foreseen})
    made = config(tmp_path)
    ((name, value, why),) = verdict.checkpointing(made)
    assert (name, value, made.gradient_checkpointing) == ("gradient_checkpointing", expected, expected)
    assert "of 24 GiB" in why
    assert verdict.checkpointing(config(tmp_path, gradient_checkpointing=False)) == []
    assert verdict.checkpointing(config(tmp_path, activation_checkpointing=True)) == []
    assert verdict.checkpointing(config(tmp_path, use_cpu=True)) == []


def test_a_plan_of_the_run_decides(tmp_path: Path, monkeypatch: Any) -> None:
    """The plan itself, of a card that is as large as what it foresees, and of one twice as large."""
    monkeypatch.setattr(verdict, "plan", plan)
    data = write_data(tmp_path / "data.jsonl")
    told = settings(data, tmp_path / "run", loss="dpo", **QUIET)
    peak = plan(parse_settings(told), device_memory="24GiB")["peak_memory_bytes"]
    for room, expected in ((peak, True), (2 * peak, False)):
        card = SimpleNamespace(total_memory=room)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        ((_, value, why),) = verdict.checkpointing(parse_settings(told))
        assert value is expected, why
        assert "foreseen" in why


def test_tf32_counts_as_rounding_and_rewards_do_without(monkeypatch: Any) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    device, model = torch.device("cuda"), torch.nn.Linear(2, 2).to("cuda")
    model.device, model.dtype = device, torch.float32  # type: ignore[assignment]
    try:
        assert precision(model) == torch.float32
        matmul.fp32_precision = "tf32"
        assert precision(model) == torch.float16
        with wide.all_digits(device):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with wide.all_digits(torch.device("cpu")):
            assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
