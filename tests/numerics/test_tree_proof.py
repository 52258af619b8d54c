"""Tree rows are given to makes of models that are proven on a small copy, and to no others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from rankalign.errors import InputError
from rankalign.rows import proof, shrink, verdict
from rankalign.rows.logps import list_logps, supports_tree, why_padded
from rankalign.rows.own import trunk_of
from rankalign.rows.shrink import class_of, few_layers, small_configs
from rankalign.rows.tree import padded_rows
from rankalign.rows.trunk import ATTENTION, MASK, NEITHER

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


# --- layers with habits that trees do not have -------------------------------------------------------------------


class Mixer(nn.Module):
    """An MLP behind something that lets a token of the row know of others."""

    def __init__(self, habit: str, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.habit, self.mlp = habit, mlp
        self.taps = nn.Parameter(torch.zeros(3, width))  # as a fresh one may be: only training would make it show

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "convolution":
            x = x + sum(self.taps[i] * nn.functional.pad(x, (0, 0, i, 0))[:, : x.shape[1]] for i in range(3))
        elif self.habit == "token shift":
            x = torch.cat([x[:, :1], (x[:, 1:] + x[:, :-1]) / 2], 1)
        elif self.habit == "recurrent state":
            x = x + self.taps[0] * x.cumsum(1) / (1 + torch.arange(x.shape[1], device=x.device)[:, None])
        elif self.habit == "row position":
            x = x * (1 + 0.01 * torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None])
        return self.mlp(x)


class OwnAttention(LlamaAttention):
    """Attention that is not the model's attention function's, or asks more of it than it says."""

    habit = ""

    def forward(self, hidden_states: Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if self.habit == "a mask of its own":
            size = hidden_states.shape[1]
            apart = torch.arange(size)[:, None] - torch.arange(size)[None]
            attention_mask = torch.where((apart >= 0) & (apart < 5000), 0.0, -torch.inf)[None, None].to(hidden_states)
        if self.habit == "keys of its own choice":
            kwargs["indices"] = torch.zeros(1, dtype=torch.long)
        if self.habit == "no interface":
            q, k = (p(hidden_states).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
            v = self.v_proj(hidden_states).unflatten(-1, (4, 4)).transpose(1, 2)
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(out.transpose(1, 2).flatten(2)), None
        return super().forward(hidden_states, *args, attention_mask=attention_mask, **kwargs)


class ToyModel(LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.mlp = Mixer(config.habit, layer.mlp, config.hidden_size)
            layer.self_attn = OwnAttention(config, index)
            layer.self_attn.habit = config.habit


class Toy(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)


def toy(habit: str, **more: Any) -> Toy:
    torch.manual_seed(0)
    return Toy(LlamaConfig(**SMALL, habit=habit, **more))


def test_a_toy_without_habits_is_proven() -> None:
    assert verdict.verdict_of(toy("none")) == proof.Verdict(ATTENTION, keeps_prefix=True)


@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ("convolution", "differ by"),
        ("token shift", "differ by"),
        ("recurrent state", "differ by"),
        ("row position", "differ by"),
        ("a mask of its own", "masks of their own"),
        ("keys of its own choice", "'indices'"),
        ("no interface", "interface of transformers"),
    ],
)
def test_a_layer_that_knows_of_its_neighbours_is_refused(habit: str, reason: str) -> None:
    model = toy(habit)
    assert not supports_tree(model)
    assert reason in why_padded(model)
    assert "llama" in why_padded(model)
    with pytest.raises(InputError, match="use layout 'padded'"):
        list_logps(model, [[3, 4]], [[[5, 6], [7]]], layout="tree")
    found = list_logps(model, [[3, 4]], [[[5, 6], [7]]])
    logits = model(torch.tensor([[3, 4, 5, 6]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found[0, 0], logits[1, 5] + logits[2, 6], rtol=1e-4, atol=1e-5)


def test_nothing_that_a_copy_is_made_of_is_changed() -> None:
    model = toy("none")
    before, kernel = json.dumps(model.config.to_dict(), sort_keys=True), model.config._attn_implementation
    state, weights = torch.random.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    verdict.verdict_of(model)
    assert json.dumps(model.config.to_dict(), sort_keys=True) == before
    assert model.config._attn_implementation == kernel
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("around", ["inference", "no_grad", "autocast", "meta", "fake"])
def test_a_proof_runs_in_the_midst_of_anything(around: str) -> None:
    from torch._subclasses import FakeTensorMode

    model = toy("none", rms_norm_eps=1e-7)
    verdict._proven.clear()
    context: Any = {
        "inference": torch.inference_mode, "no_grad": torch.no_grad, "fake": FakeTensorMode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "meta": lambda: torch.device("meta"),
    }[around]  # fmt: skip
    with context():
        assert verdict.verdict_of(model).way == ATTENTION


# --- real makes --------------------------------------------------------------------------------------------------

# Its attention goes through the interface since 5.24.
GPTJ = MASK if version.parse(transformers.__version__) < version.parse("5.24") else ATTENTION

GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAKES: dict[str, tuple[str, dict[str, Any]]] = {
    # thresholds as in published configurations, far beyond the lists of the proof
    "llama4_text": (NEITHER, GROUPED | {"num_local_experts": 2, "intermediate_size_mlp": 24}),
    "deepseek_v32": (
        NEITHER,
        SMALL | EXPERTS | {"n_routed_experts": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "index_topk": 2048},
    ),
    "mistral": (ATTENTION, GROUPED | {"sliding_window": 4096}),
    "gpt_oss": (ATTENTION, GROUPED | EXPERTS | {"num_local_experts": 4, "sliding_window": 128}),
    "gptj": (GPTJ, {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2}),
    "falcon": (MASK, {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "lfm2": (NEITHER, GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "bloom": (NEITHER, {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "mamba": (NEITHER, {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2}),
}  # fmt: skip


@pytest.mark.parametrize("family", MAKES)
def test_the_ways_of_real_makes(family: str) -> None:
    way, settings = MAKES[family]
    model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    found = proof.prove(class_of(trunk_of(model)), trunk_of(model).config)
    assert found.way == way, found.reason
    assert bool(found.reason) == (way == NEITHER)


@pytest.mark.parametrize(("family", "kept"), [("llama", True), ("diffllama", False)])
def test_prompts_are_kept_where_answers_may_run_after_them(family: str, kept: bool) -> None:
    """Not by layers that attend twice: a layer's keys are kept under its name."""
    model = transformers.AutoModel.from_config(CONFIG_MAPPING[family](**GROUPED))
    assert proof.prove(class_of(model), model.config) == proof.Verdict(ATTENTION, keeps_prefix=kept)


def test_a_copy_has_a_layer_of_every_kind() -> None:
    config = CONFIG_MAPPING["gemma3_text"](**GROUPED | {"num_hidden_layers": 26, "layer_types": None})
    small = few_layers(transformers.Gemma3TextModel, config)
    assert small.num_hidden_layers == 6
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert config.num_hidden_layers == 26


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "LlamaModel"), ("qwen3_moe", "Qwen3MoeModel"), ("gpt_oss", "GptOssModel"), ("gemma2", "Gemma2Model")],
)
def test_copies_of_published_sizes_are_small(family: str, kind: str) -> None:
    """The defaults of these configurations are those of a published model of 7 to 120 billion weights."""
    config = next(small_configs(CONFIG_MAPPING[family]()))
    few = few_layers(getattr(transformers, kind), config)
    with torch.device("meta"):
        model = getattr(transformers, kind)(few)
    assert sum(weight.numel() for weight in model.parameters()) < 10_000_000
    assert (config.sliding_window or 5) <= shrink.REACH if hasattr(config, "sliding_window") else True


def test_a_window_as_long_as_the_lists_would_hide_that_it_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why copies have short windows: a layer that forgets its own passes with a long one."""
    from rankalign.rows import attention

    right = attention.tree_attention
    monkeypatch.setattr(
        attention, "tree_attention", lambda *a, sliding_window=None, **kw: right(*a, sliding_window=None, **kw)
    )
    config = CONFIG_MAPPING["mistral"](**GROUPED | {"sliding_window": 4096})
    assert proof.prove(transformers.MistralModel, config).way == NEITHER
    monkeypatch.setattr(shrink, "REACH", 64)
    assert proof.prove(transformers.MistralModel, config).way == ATTENTION


def test_gradients_are_looked_at_and_not_values_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankalign.rows import attention

    right = attention.tree_attention

    def half(*args: Any, **kwargs: Any) -> Tensor:
        out = right(*args, **kwargs)
        return out / 2 + out.detach() / 2

    monkeypatch.setattr(attention, "tree_attention", half)
    found = proof.prove(transformers.LlamaModel, LlamaConfig(**SMALL))
    assert found.way == NEITHER
    assert "gradients of" in found.reason


def test_an_attention_of_another_type_is_left_to_the_model() -> None:
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=4, reorder_and_upcast_attn=True)
    assert "float32" in why_padded(transformers.GPT2LMHeadModel(config))


# --- what is kept ------------------------------------------------------------------------------------------------


def test_a_make_is_proven_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path))
    proofs: list[Any] = []
    monkeypatch.setattr(verdict, "prove", lambda kind, config: proofs.append(kind) or proof.Verdict(MASK, "", True))

    def asked(**more: Any) -> str:
        verdict._proven.clear()  # as in a new process
        return verdict.verdict_of(LlamaForCausalLM(LlamaConfig(**SMALL | more))).way

    assert [asked(), asked()] == [MASK, MASK]
    assert len(proofs) == 1
    asked(hidden_act="gelu")
    assert len(proofs) == 2
    monkeypatch.setattr(verdict, "_code", lambda: "another version")
    asked()
    assert len(proofs) == 3
    for kept in (tmp_path / "trees").iterdir():
        kept.write_text('{"way": 1')
    assert asked() == MASK
    assert len(proofs) == 4


def test_classes_that_are_not_of_transformers_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path))
    verdict._proven.clear()
    assert verdict.verdict_of(toy("none", rms_norm_eps=1e-4)).way == ATTENTION
    assert not (tmp_path / "trees").exists()


def test_padded_rows_of_a_proof_are_the_models_own() -> None:
    """What the proof compares with is the model's own forward of each text."""
    config = LlamaConfig(**GROUPED)
    run = proof._Run(shrink.build(transformers.LlamaModel, config))
    with proof._by_itself():
        run.expect()
        alone = [
            run.model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, len(prompt) - 1 : -1]
            for prompt, row in zip(run.prompts, run.answers, strict=True)
            for answer in row
        ]
    torch.testing.assert_close(run.states, torch.cat(alone), rtol=1e-11, atol=1e-11)
    assert padded_rows(run.prompts, run.answers).forest is None


def test_a_model_whose_weights_are_spread_is_proven_as_its_make() -> None:
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
        assert type(model.model) is not LlamaModel
        assert class_of(model.model) is LlamaModel
        assert verdict.verdict_of(model).way == ATTENTION
    finally:
        torch.distributed.destroy_process_group()
