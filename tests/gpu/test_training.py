"""Whole runs on a GPU, in the numerics that users train in, and runs that are told to stay away from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.rows import attention
from rankalign.rows.logps import choose_layout, list_logps
from rankalign.rows.rewards import list_rewards
from rankalign.training import inputs
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.e2e.distributed import settings, write_data
from tests.gpu.models import build, lists

METHODS: dict[str, dict[str, Any]] = {
    "rrhf": {"loss": "rrhf"},
    "dpo-lora": {"loss": "dpo", "use_lora": True},
    "sft-checkpointing": {"method": "sft", "gradient_checkpointing": True},
    "reward": {"method": "reward"},
}
ONE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3, "save_steps": 3}


@pytest.fixture(autouse=True)
def _device_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    yield
    models.stay_on_cpu(False)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "log.jsonl").open()) if "loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_runs_in_bf16_learn_what_the_cpu_learns(method: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    for name, more in (("cpu", {"use_cpu": True}), ("gpu", {"bf16": True})):
        train(parse_settings(settings(data, tmp_path / name, **METHODS[method], **ONE, **more)))
    here, there = (losses(tmp_path / name) for name in ("cpu", "gpu"))
    assert here != there  # another device, in another type
    assert there == pytest.approx(here, rel=0.03, abs=0.01)


def test_a_run_told_to_use_the_cpu_touches_no_gpu(tmp_path: Path, watch: Any) -> None:
    data = write_data(tmp_path / "data.jsonl")
    with watch() as log:
        train(parse_settings(settings(data, tmp_path / "run", loss="dpo", use_cpu=True, **ONE)))
    assert not [kernel for kernel in log.kernels if kernel[0].startswith(("aten::mm", "aten::addmm"))]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"bf16": True, "use_lora": True}, "bfloat16"),
        ({"bf16": True}, "float32"),
        ({"use_lora": True}, "bfloat16"),
        ({"use_lora": True, "bf16": False}, "float32"),
        ({"bf16": True, "use_lora": True, "dtype": "float32"}, "float32"),
        ({"bf16": True, "use_lora": True, "use_cpu": True}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_only_frozen_weights_are_in_16_bits_by_themselves(more: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config = parse_settings({"model": "tiny", "data": "x.jsonl", "output_dir": str(tmp_path), **more})
    assert config.weights_dtype == expected
    model = inputs.load_model(config.model_settings, models.load_tokenizer("tiny"), dtype=config.weights_dtype)
    types = {(p.requires_grad, str(p.dtype).removeprefix("torch.")) for p in model.parameters()}
    assert types == ({(True, "float32"), (False, expected)} if config.use_lora else {(True, expected)})


def test_other_types_of_weights_are_refused() -> None:
    with pytest.raises(InputError, match="--dtype 'float16'"):
        parse_settings({"model": "tiny", "data": "x.jsonl", "dtype": "float16"})


def test_rewards_are_float32_at_the_head_of_a_model_in_bfloat16() -> None:
    narrow, _ = models.load_reward_model("tiny-rm")
    assert next(narrow.base_model.parameters()).dtype == torch.bfloat16
    folder = models.local_folder("tiny-rm")
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert torch.equal(narrow.score.weight.cpu(), stored["score.weight"])  # the digits of the file, all of them
    prompts, responses = lists()
    with torch.no_grad():
        found = list_rewards(narrow, prompts, responses)
        ids = torch.tensor([prompts[0] + responses[0][0]], device="cuda")
        own = narrow(input_ids=ids, use_cache=False).logits
    assert found.dtype == own.dtype == torch.float32
    values = found[found != 0]
    assert bool((values != values.bfloat16().float()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_is_tried_against_its_own_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake below the tenth of a nat a token that fixed bounds let pass is not the rounding of this model."""
    model = build("llama", torch.float32, initializer_range=0.02).to("cuda", dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype is torch.float32):
        assert choose_layout(model, *lists())[0] == "tree"
        ragged = attention.ragged_attention
        monkeypatch.setattr(attention, "ragged_attention", lambda *args: ragged(*args) * 1.5)
        layout, why = choose_layout(model, *lists())
    assert (layout, "rounding" in why) == ("padded", True)


def test_references_run_together_up_to_the_token_budget() -> None:
    prompts, responses = lists()
    model = build("llama", torch.float32, initializer_range=0.02).to("cuda")
    texts = [TokenList(str(i), p, r, [0.0] * len(r)) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    with torch.no_grad():
        together = inputs.start_logps("float32", model, "tree", texts, 1000)
        alone = [list_logps(model, [t.prompt], [t.responses])[0].cpu() for t in texts]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
