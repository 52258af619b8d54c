"""Eight-bit weights: the rounding against its definition, memory, logits, ties, adapters and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rankalign.data.records import CandidateSet
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.errors import InputError
from rankalign.models import adapters, tiny
from rankalign.models import load as models
from rankalign.models.quant import GROUP, Int8Rows, quantize_8bit, weight_bytes

TEXT = "The capital of France is Paris, and the sky is blue because of Rayleigh scattering. Once upon a time a dog"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def test_rounding_is_to_the_nearest_of_255_steps_of_each_group() -> None:
    matrix = torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = Int8Rows(matrix)
    for row in range(5):
        for group in range(2):
            values = matrix[row, group * GROUP : (group + 1) * GROUP]
            step = float(values.abs().max()) / 127
            stored = rows.weight[row, group * GROUP : (group + 1) * GROUP]
            assert float(rows.scale[row, group]) == pytest.approx(step, rel=1e-6)
            assert stored.tolist() == [round(float(value) / step) for value in values]
            assert stored.abs().max() == 127
    assert float((rows.rows(slice(0, 5)) - matrix).abs().max()) <= 0.5001 * float(rows.scale.max())


@pytest.mark.parametrize(("width", "groups"), [(64, 1), (96, 3), (128, 2), (50, 1), (7, 1)])
def test_groups_divide_the_row_and_zeros_stay_zero(width: int, groups: int) -> None:
    rows = Int8Rows(torch.zeros(3, width))
    assert rows.scale.shape == (3, groups)
    assert rows.rows(torch.tensor([2, 0])).tolist() == [[0.0] * width] * 2


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=500, tie_word_embeddings=tied, **sizes)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=128, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize("make", [lambda: llama(True), lambda: llama(False), gpt2], ids=["tied", "untied", "gpt2"])
def test_memory_and_logits(make: Any) -> None:
    model, ids = make(), torch.arange(40).unsqueeze(0) * 11
    full = weight_bytes(model)
    assert full == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    with torch.inference_mode():
        wanted = model(ids).logits
        quantize_8bit(model, torch.float32)
        found = model(ids).logits
    assert found.dtype == torch.float32
    assert cosine(found, wanted) > 0.999
    assert not torch.equal(found, wanted)
    assert weight_bytes(model) <= 0.3 * full  # 1 + 4 / GROUP bytes of 4, norms and biases whole
    assert not any(type(module) in (nn.Linear, nn.Embedding, Conv1D) for module in model.modules())


def test_the_other_weights_take_the_type_that_is_computed_in() -> None:
    model = llama(True).bfloat16()
    quantize_8bit(model, torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.dtype == torch.bfloat16
    scales = [p for name, p in model.named_parameters() if name.endswith("scale")]
    assert {p.dtype for p in scales} == {torch.float32}


def test_load_policy_generates_the_likeliest_text_of_the_rounded_weights() -> None:
    assert models.device().type == "cpu"
    engine = HFEngine(Policy("p", model="tiny", sampling=SamplingParams(max_new_tokens=12, temperature=0)))
    engine.model = models.load_policy("tiny", quantize="8bit")
    [[answer]] = engine.generate([CandidateSet("a", "Hello")])
    twin: Any = tiny.build_model()
    with torch.no_grad():
        for module in twin.modules():
            if type(module) in (nn.Linear, nn.Embedding):
                module.weight.copy_(Int8Rows(module.weight.detach()).rows(slice(None)))
    engine.model = twin
    assert answer == engine.generate([CandidateSet("a", "Hello")])[0][0]
    assert len(answer.text) > 4
    with pytest.raises(InputError, match="give 8bit or nothing"):
        models.load_policy("tiny", quantize="3bit")


def test_an_adapter_keeps_its_width_and_its_effect(tmp_path: Path) -> None:
    adapted = adapters.add_lora(models.load_policy("tiny"), r=4, dropout=0.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(6, 38).unsqueeze(0)
    with torch.inference_mode():
        wanted = models.load_policy("tiny", adapter=str(tmp_path / "adapter"))(ids).logits
        small = models.load_policy("tiny", adapter=str(tmp_path / "adapter"), quantize="8bit")
        found, bare = small(ids).logits, models.load_policy("tiny")(ids).logits
    assert cosine(found, wanted) > 0.999
    assert cosine(bare, wanted) < 0.99
    assert {p.dtype for name, p in small.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.weights
@pytest.mark.slow
def test_the_default_model() -> None:
    tokenizer = models.load_tokenizer("default")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    full, small = models.load_policy("default"), models.load_policy("default", quantize="8bit")
    with torch.inference_mode():
        assert cosine(small(ids).logits, full(ids).logits) > 0.999
    assert weight_bytes(small) <= 0.27 * weight_bytes(full)  # of float32; so of 16 bits:
    assert weight_bytes(small) <= 0.6 * weight_bytes(full) / 2
