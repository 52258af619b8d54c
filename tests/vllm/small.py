"""Small models whose heads are as wide as vLLM's kernels for CPUs want them, and a server for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rankalign.models import tiny
from tests.faults.openai_helpers import fetch, free_port, wait_for


def save(folder: Path, grades: bool = False, **more: Any) -> str:
    """A Llama of two layers with heads of 32, or a reward model on the same trunk; float32, with its tokenizer."""
    tokenizer = tiny.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **({"num_labels": 1} if grades else {}), **more,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    model: Any = (LlamaForSequenceClassification if grades else LlamaForCausalLM)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (1.0 if "embed" in name else 0.1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def served(model: str, log: Path, *words: str) -> Iterator[str]:
    """``vllm serve`` on loopback; gives its address."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--served-model-name", "it"]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *words]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=stream, stderr=stream, start_new_session=True
        )

    def ready() -> bool:
        try:
            return bool(fetch(f"http://127.0.0.1:{port}/v1/models"))
        except OSError:
            return False

    try:
        wait_for(ready, process, 500)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # it ends its own engine process
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # told so while it starts, it may wait for its engine for ever
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
