"""No process ever holds the whole model: two of them, 350 MB in files of 50 MB, and the kernel's own count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rankalign.models import tiny

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that two processes cannot share evenly, and no file that is larger than 54 MB."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 8}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=6001, num_key_value_heads=4, **sizes))
    assert 340 * MB < 4 * made.num_parameters() < 360 * MB
    made.save_pretrained(folder, max_shard_size="50MB")
    made.name_or_path = str(folder)
    lora = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    lora.save_pretrained(folder / "adapter")
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def launch(kind: str, model: Path, out: Path) -> list[dict[str, Any]]:
    env = {**os.environ, **(FSDP if kind.startswith("fsdp") else ZERO3), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "PYTHONPATH": str(ROOT)}
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, so that the count is of what is held
    words = [sys.executable, "-m", "tests.e2e.sharded_child", kind, str(model), str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    both: list[Any] = [
        subprocess.Popen(words, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in range(2)
    ]
    try:
        for process in both:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in both:
            process.kill()
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts so")
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_process_holds_its_shard_and_one_file(kind: str, model: Path, tmp_path: Path) -> None:
    files = [file.stat().st_size for file in model.glob("*.safetensors")]
    bound = 1.2 * sum(files) / 2 + max(files)
    assert len(files) > 6
    assert bound < 0.8 * sum(files)
    both = launch(kind, model, tmp_path / "out")
    print(kind, {"files": sum(files) / MB, "largest": max(files) / MB, "bound": bound / MB}, both)
    for facts in both:
        assert facts["way"] == kind
        assert facts["equal"]
        assert facts["load"] <= bound
        assert facts["save"] <= 4 * 4 * 6001 * 1024  # the largest tensor, gathered, and the copies on its way
    saved, wanted = (_tensors(folder) for folder in (tmp_path / "out-saved", model))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "out-saved").glob("*.safetensors"))) > 5
    assert torch.equal(
        LlamaForCausalLM.from_pretrained(tmp_path / "out-saved").lm_head.weight, wanted["lm_head.weight"]
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts so")
@pytest.mark.parametrize("kind", ["fsdp-dora", "fsdp-adapter", "fsdp-reward", "zero3-dora", "zero3-adapter"])
def test_so_do_adapters_and_reward_models(kind: str, model: Path, tmp_path: Path) -> None:
    files = [file.stat().st_size for file in model.glob("*.safetensors")]
    both = launch(kind, model, tmp_path / "out")
    print(kind, both)
    for facts in both:
        assert facts["way"] == kind.partition("-")[0]
        assert facts["equal"]
        assert facts["own"]
        assert facts["load"] <= 1.2 * sum(files) / 2 + max(files)
    saved = _tensors(tmp_path / "out-saved")
    if kind.endswith("adapter"):
        wanted = _tensors(model / "adapter")
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    elif kind.endswith("reward"):
        assert LlamaForSequenceClassification.from_pretrained(tmp_path / "out-saved").score.weight.any()
    else:
        assert sum("lora_magnitude" in name for name in saved) == 6 * 7


@pytest.mark.slow
def test_the_count_sees_a_whole_model(model: Path, tmp_path: Path) -> None:
    files = [file.stat().st_size for file in model.glob("*.safetensors")]
    both = launch("fsdp-plain", model, tmp_path / "out")
    print("plain", both)
    assert all(facts["load"] > 0.95 * sum(files) for facts in both)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found
