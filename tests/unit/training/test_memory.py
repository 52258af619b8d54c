"""What makes training fit: DoRA, quantised weights, 8-bit Adam, adapters that train on; and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.e2e.distributed import log, settings, write_data

quant = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def trained(tmp_path: Path, name: str = "run", **more: Any) -> Path:
    data = tmp_path / "data.jsonl"
    if not data.exists():
        write_data(data)
    short = {
        "max_steps": 3,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "warmup_steps": 0,
    }
    train(parse_settings(settings(data, tmp_path / name, **short, **more)))
    return tmp_path / name


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_dora_learns_lengths(tmp_path: Path) -> None:
    found = adapter(trained(tmp_path, use_lora=True, use_dora=True))
    lengths = {name: value for name, value in found.items() if "magnitude" in name}
    start = dict(models.load_policy("tiny").named_parameters())
    assert lengths
    for name, value in lengths.items():
        base = start[name.removeprefix("base_model.model.").split(".lora_magnitude")[0] + ".weight"]
        assert not torch.equal(value, base.norm(dim=1))
        torch.testing.assert_close(value, base.norm(dim=1), atol=0.02, rtol=0)


@quant
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_stay_and_the_adapter_learns(bits: int, tmp_path: Path) -> None:
    more = {"use_lora": True, f"load_in_{bits}bit": True, "loss": "dpo", "learning_rate": 1e-2}
    folder = trained(tmp_path, **more)
    assert any(bool(value.any()) for name, value in adapter(folder).items() if "lora_B" in name)
    whole = trained(tmp_path, "whole", use_lora=True, loss="dpo")
    # Policy and reference are one at the start, quantised or not, so the first loss is log 2 of whatever it sums.
    assert log(folder)[0]["loss"] == pytest.approx(log(whole)[0]["loss"], abs=1e-4)
    assert log(folder)[0]["margin"] != pytest.approx(log(whole)[0]["margin"], abs=1e-6)


@quant
def test_eight_bit_adam(tmp_path: Path) -> None:
    wide, narrow = trained(tmp_path, "wide"), trained(tmp_path, "narrow", optim="adamw_bnb_8bit")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (wide, narrow))
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-3  # less than one step of 1e-3


def test_adapter_trains_on_from_where_it_was(tmp_path: Path) -> None:
    first = trained(tmp_path, "first", use_lora=True, lora_r=4)
    again = trained(tmp_path, "again", use_lora=True, model=str(first), learning_rate=0.0)
    before, after = adapter(first), adapter(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    more = adapter(trained(tmp_path, "more", use_lora=True, model=str(first)))
    assert {name: value.shape for name, value in more.items()} == {name: v.shape for name, v in before.items()}
    assert any(not torch.equal(before[name], more[name]) for name in before)
    with pytest.raises(InputError, match="is an adapter: --use_lora trains it on"):
        trained(tmp_path, "full", model=str(first))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "--use_dora is a kind of --use_lora"),
        ({"load_in_4bit": True}, "needs --use_lora"),
        ({"use_lora": True, "load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"use_liger_kernel": True}, "--use_liger_kernel .* rows do not pass"),
        ({"accelerator_config": '{"even_batches": false}'}, "even_batches"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings({"data": "x.jsonl", "use_cpu": True, **more})
