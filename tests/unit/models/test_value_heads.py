"""Reward models that trl, trlX and DeepSpeed-Chat save give trunk . head at the last token, from ``.bin`` as well."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.scorers.reward_model import RewardModelScorer

IDS = torch.tensor([[1, 40, 77, 100, 261]])
SMALL: dict[str, Any] = {"vocab_size": 262, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Prefix of the trunk, of the head, whether it has a bias, whether the language-model head is there as well.
LAYOUTS = {
    "trl": ("{own}.", "v_head.summary", True, True),
    "trl wrapped": ("pretrained_model.{own}.", "v_head.summary", True, True),
    "trlx": ("transformer.", "v_head", False, False),
    "deepspeed-chat": ("rwtranrsformer.", "v_head", False, False),
}


def save(folder: Path, family: str, layout: str, file: str = "pytorch_model.bin") -> torch.Tensor:
    """Save a reward model as another trainer does; its reward of IDS, computed from trunk and head by hand."""
    torch.manual_seed(2)
    settings = LLAMA if family == "Llama" else GPT
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings)).eval()
    prefix, head, biased, whole = LAYOUTS[layout]
    state = {prefix.format(own=model.base_model_prefix) + n: t for n, t in model.base_model.state_dict().items()}
    weight, bias = torch.randn(1, 32), torch.randn(1)
    state |= {f"{head}.weight": weight} | ({f"{head}.bias": bias} if biased else {})
    if whole:
        state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    folder.mkdir()
    model.config.save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file)
    with torch.no_grad():
        states = model.base_model(input_ids=IDS).last_hidden_state[0, -1]
        return states @ weight[0] + (bias[0] if biased else 0.0)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("family", ["GPTJ", "Llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_value_head_is_a_reward_head(tmp_path: Path, layout: str, family: str, file: str) -> None:
    expected = save(tmp_path / "rm", family, layout, file)
    reward, _ = models.load_reward_model(str(tmp_path / "rm"), dtype="float32", new_head=False)
    with torch.no_grad():
        torch.testing.assert_close(reward(input_ids=IDS).logits[0, 0], expected)


def test_it_scores(tmp_path: Path) -> None:
    save(tmp_path / "rm", "GPTJ", "trl")
    scorer = RewardModelScorer("rm", str(tmp_path / "rm"), template="raw")
    record = CandidateSet("a", "hello", [Response("yes", policy="x"), Response("no", policy="x")])
    ((first, second),) = scorer.score([record])
    assert first != second
    assert len(models.weights_fingerprint(str(tmp_path / "rm"))) == 64


def test_what_is_no_reward_model_says_what_to_do(tmp_path: Path) -> None:
    save(tmp_path / "rm", "Llama", "trlx")
    path = tmp_path / "rm/pytorch_model.bin"
    whole = torch.load(path, weights_only=True)
    cases = {
        "v_head.weight": (torch.zeros(2, 32), "no linear layer of one output"),
        "transformer.layers.0.mlp.up_proj.weight": (torch.zeros(3, 3), r"has shape \[3, 3\]"),
        "critic.weight": (torch.zeros(3, 3), "critic.weight belongs neither"),
    }
    for name, (tensor, message) in cases.items():
        torch.save(whole | {name: tensor}, path)
        with pytest.raises(InputError, match=message):
            models.load_reward_model(str(tmp_path / "rm"))
    path.write_bytes(pickle.dumps({"v_head.weight": print}))
    with pytest.raises(InputError, match="plain tensors"):
        models.load_reward_model(str(tmp_path / "rm"))


def test_a_head_of_two_outputs_says_how_to_make_it_one(tmp_path: Path) -> None:
    config = tiny.build_tiny_reward_model().config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has shape .2, 32.*row 1 less row 0"):
        models.load_reward_model(str(tmp_path), new_head=False)
