"""Llama 3 70B on one of eight pretended GPUs: it starts, steps and is saved, and none holds more than its part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9


def test_a_model_of_70b_starts_steps_and_is_saved(tmp_path: Path) -> None:
    launched = {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "bf16"}
    launched |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    words = [sys.executable, "-m", "tests.gpu.seventy", "80", str(tmp_path)]
    env = {**os.environ, **launched, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    print(facts)
    assert (facts["way"], facts["device"]) == ("fsdp", "cuda")
    assert facts["weights"] == 70_553_706_496  # as published
    shard = 4 * facts["weights"] / 8
    layer = 2 * 855_654_400  # in bfloat16, gathered
    assert facts["held"] <= 1.001 * shard  # float32 masters
    assert facts["gradients"] <= 1.001 * shard
    # At most the gathered weights of two layers, their gradients in bfloat16 and float32, and the head's stand beside.
    assert facts["peak"] <= 2 * shard + 6 * layer
    assert 3 * shard <= facts["updated"] <= 3.01 * shard  # and Adam's two averages
    # Files hold every number once, and a gathered tensor is all that stands beside the shards while they are written.
    assert facts["saved"] == 4 * facts["weights"]
    assert facts["largest"] == 4 * 128256 * 8192
    assert facts["saving"] <= 2.5 * facts["largest"]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == facts["saved"]
    assert len(index["weight_map"]) == 80 * 9 + 3
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["architectures"], config["num_hidden_layers"]) == (["LlamaForCausalLM"], 80)
