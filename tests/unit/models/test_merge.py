"""A merged adapter computes what base and adapter computed, also where embeddings and head share weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rankalign.errors import InputError
from rankalign.models import delta, tiny
from rankalign.models.merge import merge_lora

WORDS = 262  # of the tiny tokenizer
IDS = torch.tensor([[1, 5, 9, 40, 77, 100, 261]])
SMALL: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
GPT: dict[str, Any] = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}
BASES = {
    "llama": ("Llama", SMALL, "q_proj", "embed_tokens"),
    "gemma3": ("Gemma3Text", SMALL, "q_proj", "embed_tokens"),
    "gpt2": ("GPT2", GPT, "c_attn", "wte"),
    "opt": ("OPT", OPT, "q_proj", "embed_tokens"),
}
ADAPTED: dict[str, Any] = {
    "neither": ([], {}),
    "head": (["lm_head"], {}),
    "embedding": (["embed"], {}),
    "both": (["embed", "lm_head"], {}),
    "whole head": ([], {"modules_to_save": ["lm_head"]}),
    "whole embedding": ([], {"modules_to_save": ["embed"]}),
    "some tokens": ([], {"trainable_token_indices": [3, 9, 40]}),
}


def adapter_of(folder: Path, base: str, adapted: str) -> torch.Tensor:
    """Save a tied base and an adapter with random weights; the logits of the two together."""
    kind, settings, attention, embedding = BASES[base]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind + "Config")(**settings))
    model.save_pretrained(folder / "base")
    tiny.build_tokenizer().save_pretrained(folder / "base")
    targets, more = ADAPTED[adapted]
    named = json.loads(json.dumps([targets, more]).replace('"embed"', f'"{embedding}"'))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        target_modules=[attention, *named[0]],
        **named[1],
    )
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight += 0.3 * torch.randn_like(weight)
    wrapped.save_pretrained(folder / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder / "base")
    return logits(peft.PeftModel.from_pretrained(again, folder / "adapter"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


CASES = [("llama", adapted) for adapted in ADAPTED] + [(b, a) for b in list(BASES)[1:] for a in ("head", "embedding")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "adapted"), CASES)
def test_tied_embeddings_are_untied_where_the_adapter_moves_them_apart(tmp_path: Path, base: str, adapted: str) -> None:
    expected = adapter_of(tmp_path, base, adapted)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) - expected).abs().max() > 0.01
    merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == merged.config.tie_word_embeddings
    if adapted == "neither":
        assert tied
        assert (
            load_file(tmp_path / "merged/model.safetensors").keys()
            == load_file(tmp_path / "base/model.safetensors").keys()
        )


@pytest.mark.filterwarnings("ignore")
def test_a_delta_of_a_merged_adapter_recovers_what_the_adapter_computed(tmp_path: Path) -> None:
    expected = adapter_of(tmp_path, "llama", "head")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "delta", "back")]
    assert delta.make(*paths[:3], merge_adapter=True)["bit_exact"]
    delta.apply(paths[0], paths[2], paths[3])
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(paths[3])), expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_of_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    tiny.save_reward_model(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped)
    merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter_of(tmp_path, "llama", "neither")
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "merge", lambda *_, **__: None)
    with pytest.raises(InputError, match="off by"):
        merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
