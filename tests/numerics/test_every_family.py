"""Log-probs, gradients and greedy answers of every causal family of transformers that can be made tiny equal the plain
model's, one text at a time, with our kernels and without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankalign.engines.uncached import rows_of
from rankalign.errors import InputError
from rankalign.rows import gemm
from rankalign.rows.head import OwnHead, head_of
from rankalign.rows.logps import choose_layout, list_logps

WORDS = 61
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "d_ff", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "pad_token_id_"), 2),
    **dict.fromkeys(("n_group", "topk_group", "encoder_layers", "bos_token_id"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "qk_nope_head_dim": 4,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "is_decoder": True,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
LATENT = {"num_key_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MORE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "falcon": {"head_dim": None},
    "falcon_h1": {"lm_head_multiplier": 2.5},
    "hyperclovax": {"logits_scaling": 2.5},
    "gemma2": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "block_types": ["recurrent", "attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "final_logit_softcapping": 2.0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "dots1"), LATENT),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "minimax"), LINEAR),
}
# Families that are no language model by themselves, or only with tokens that attend to what follows them.
NOT_CAUSAL = {"xlm", "cpmant", "prophetnet"}
QUICK = ("llama4_text", "gemma3n_text", "minimax", "recurrent_gemma", "roberta", "hyperclovax", "marian", "mamba")


def tiny(family: str) -> nn.Module:
    """The family's model with 32 hidden units and random weights, biases and norms included."""
    kind = CONFIG_MAPPING[family]
    usual = kind()
    settings = {name: value for name, value in SMALL.items() if _has(usual, name)} | MORE.get(family, {})
    config = kind(**{name: value for name, value in settings.items() if value is not None})
    torch.manual_seed(0)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if weights > 5_000_000:
        pytest.skip(f"{weights:,} weights: parts that the settings of this test do not reach")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # an attribute that varies by layer
        return True


def lists() -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randint(3, WORDS, (n,), generator=generator).tolist() for n in (5, 2, 3, 6, 4, 1)]
    return draw[:2], [draw[2:4], draw[4:]]


def plain(model: Any, prompts: Any, responses: Any) -> torch.Tensor:
    def one(prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float().log_softmax(-1)
        return logits[torch.arange(len(response)) + len(prompt) - 1, response].sum()

    return torch.stack([torch.stack([one(p, r) for r in rs]) for p, rs in zip(prompts, responses, strict=True)])


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def decoded(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    rows, found = rows_of(model, prompts, count), [[] for _ in prompts]
    for step in range(count):
        tokens = rows.logits.argmax(-1)
        for ids, token in zip(found, tokens.tolist(), strict=True):
            ids.append(token)
        if step < count - 1:
            rows.append(tokens)
            rows.select([1, 0])
            found.reverse()
    return found[:: -1 if count % 2 == 0 else 1]


def check(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        model = tiny(family)
        prompts, responses = lists()
        reference = plain(model, prompts, responses)
    except pytest.skip.Exception:
        raise
    except Exception as error:  # whatever a configuration of this test's making runs into
        pytest.skip(f"cannot be made tiny here: {type(error).__name__} {' '.join(str(error).split())[:80]}")
    if family in NOT_CAUSAL:
        with pytest.raises(InputError, match=r"see what follows|change their logits"):
            list_logps(model, prompts, responses)
        return
    wanted = gradients(model, reference.sum()) if family != "reformer" else {}
    answers = [greedy(model, prompt, 4) for prompt in prompts]
    for ours in (False, True):
        monkeypatch.setattr(gemm, "faster", lambda ours=ours: ours)
        monkeypatch.setattr(gemm, "SMALLEST", 1 if ours else 1 << 30)
        found = list_logps(model, prompts, responses)
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=2e-4)
        floor = 1e-4 * max((float(g.norm()) for g in wanted.values()), default=0)
        for name, gradient in gradients(model, found.sum()).items() if wanted else ():
            error = float((gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=floor))
            assert error < 2e-3, f"{name}: {error}"
        choose_layout(model, prompts, responses)
        assert decoded(model, prompts, 4) == answers


@pytest.mark.parametrize("family", QUICK)
def test_log_probs_gradients_and_answers_are_the_plain_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f not in QUICK])
def test_so_are_those_of_every_other_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, monkeypatch)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma2", {}), ("falcon_h1", {}), ("recurrent_gemma", {}), ("cohere", {}), ("granite", {})],
)
def test_known_names_of_scales_and_caps_keep_the_chunked_head(family: str, settings: dict[str, Any]) -> None:
    assert not isinstance(head_of(tiny(family)), OwnHead)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_an_encoder_that_looks_ahead_is_refused(kind: str) -> None:
    config = CONFIG_MAPPING[kind](
        **{k: v for k, v in SMALL.items() if k != "is_decoder" and _has(CONFIG_MAPPING[kind](), k)}
    )
    with pytest.raises(InputError, match="see what follows"):
        list_logps(AutoModelForCausalLM.from_config(config), *lists())


# --- positions that depend on the longest text of a batch ---------------------------------------------------------


def long_llama(rope: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small = {name: SMALL[name] for name in names} | {"initializer_range": 0.3}
    config = transformers.LlamaConfig(
        **small, max_position_embeddings=rope.pop("max", 64), rope_parameters={"rope_theta": 100.0, **rope}
    )
    return transformers.LlamaForCausalLM(config).eval()


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "max": 8},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 8,
        "factor": 8.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_texts_beyond_the_reach_of_their_positions_run_by_themselves(kind: str) -> None:
    prompts, responses = lists()
    responses[0].append(list(range(3, 20)))
    responses[1].append(list(range(20, 30)))

    def alone(p: list[int], r: list[int]) -> torch.Tensor:
        return plain(long_llama(dict(ROPES[kind])), [p], [[r]])[0, 0]  # a fresh model: angles remember longer texts

    reference = torch.stack([torch.stack([alone(p, r) for r in rs]) for p, rs in zip(prompts, responses, strict=True)])
    model = long_llama(dict(ROPES[kind]))
    for layout in ("auto", "padded", "auto"):
        found = list_logps(model, prompts, responses, layout=layout)
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
    short = [[list(r[:3]) for r in rs[:2]] for rs in responses]
    torch.testing.assert_close(list_logps(model, prompts, short)[0, 0], alone(prompts[0], short[0][0]))
    answers = [greedy(long_llama(dict(ROPES[kind])), prompt, 12) for prompt in prompts]
    assert decoded(model, prompts, 12) == answers
