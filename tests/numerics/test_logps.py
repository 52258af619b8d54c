"""Log-probs and their gradients equal those of one response at a time, in fp64, for every family and layout."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from rankalign.errors import InputError
from rankalign.rows import attention, gemm
from rankalign.rows.head import Head, label_logps
from rankalign.rows.linears import fast_linears
from rankalign.rows.logps import choose_layout, list_logps, supports_tree, token_logps
from rankalign.rows.tree import tree_row
from rankalign.rows.two_pass import backward_two_pass, units

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GPT |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 4}

MOE = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "experts_implementation": "eager"}
LATENT = SMALL | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}

FAMILIES = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", GROUPED | {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-window": ("Qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", GROUPED),
    "gemma": ("Gemma", GROUPED | {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", GROUPED | {"sliding_window": 7, "query_pre_attn_scalar": 9, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GROUPED | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral-window": ("Mistral", GROUPED | {"sliding_window": 6}),
    "gpt2": ("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoX", SMALL | {"rotary_pct": 0.5}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 2}),
    "opt": ("OPT", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "granite": ("Granite", GROUPED | {"logits_scaling": 3.0}),
    "cohere2": ("Cohere2", GROUPED | {"logit_scale": 0.25, "sliding_window": 6}),
    "gpt_oss": (
        "GptOss",
        GROUPED | MOE | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | MOE | {"first_k_dense_replace": 1}),
    "gemma4": (
        "Gemma4Text",
        GROUPED
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 7,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
        },
    ),
}
OTHERS = {
    "bloom": (
        "Bloom",
        {k: SMALL[k] for k in SMALL if k not in ("num_hidden_layers", "num_attention_heads")}
        | {"n_layer": 2, "n_head": 4},
    ),
    "mamba": ("Mamba", {k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, settings = (FAMILIES | OTHERS)[name]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind + "Config")(**settings)).to(dtype).train()
    if hasattr(model.config, "attn_logit_softcapping"):
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 1.5
    with torch.no_grad():  # biases and norms start at constants, which would hide mistakes
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def lists(prompt_lengths=(9, 1, 4), response_lengths=((5, 3, 8, 3, 3, 1), (3, 1), (7, 2, 2))):
    generator = torch.Generator().manual_seed(5)

    def draw(n):
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    return [draw(n) for n in prompt_lengths], [[draw(n) for n in row] for row in response_lengths]


def one_by_one(model: nn.Module, prompts, responses) -> list[list[torch.Tensor]]:
    """The reference: the model's own logits, one unpadded sequence at a time."""

    def one(prompt, response):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        picked = logits.log_softmax(-1)[torch.arange(len(response)) + len(prompt) - 1, response]
        return picked if response else logits.new_zeros(0)

    return [[one(p, r) for r in rs] for p, rs in zip(prompts, responses, strict=True)]


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def largest_error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Worst relative error of a parameter's gradient; those that are zero but for rounding count by the largest."""
    floor = 1e-6 * max(float(g.norm()) for g in reference.values())
    return max(float((ours[n] - g).norm() / g.norm().clamp(min=floor)) for n, g in reference.items())


def weigh(sums: torch.Tensor, zero: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
    """A loss with another slope in every response."""
    slopes = torch.randn(sums.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for p, n in zero:
        slopes[p, n] = 0.0
    return (sums * slopes.to(sums.dtype)).sum()


def padded_sum(tokens: list[list[torch.Tensor]]) -> torch.Tensor:
    width = max(map(len, tokens))
    zero = tokens[0][0].new_zeros(())
    return torch.stack([torch.stack([t.sum() for t in row] + [zero] * (width - len(row))) for row in tokens])


class StayWide(TorchFunctionMode):
    """Norms, rotary angles and scores that models compute in fp32 stay in fp64 here, so that agreement can be exact."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if function in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return function(*args, **kwargs)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients_equal_one_response_at_a_time(name, layout):
    model, (prompts, responses) = build(name), lists()
    with StayWide():
        reference = padded_sum(one_by_one(model, prompts, responses))
        ours = list_logps(model, prompts, responses, layout=layout)
    assert ours.dtype == torch.float64
    assert ours.shape == (3, 6)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    with StayWide():
        expected, found = gradients(model, weigh(reference)), gradients(model, weigh(ours))
    assert largest_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "gptj"])
def test_gradient_checkpointing_changes_nothing(name):
    model, (prompts, responses) = build(name), lists()
    expected = gradients(model, weigh(list_logps(model, prompts, responses, layout="tree")))
    model.gradient_checkpointing_enable()
    assert largest_error(gradients(model, weigh(list_logps(model, prompts, responses))), expected) < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2", "opt", "gptj"])
def test_responses_without_a_gradient_are_left_out_exactly(name, checkpointing):
    model, (prompts, responses) = build(name), lists()
    zero = ((0, 1), (0, 2), (0, 5), (1, 0), (1, 1), (2, 0))
    wide = nullcontext() if checkpointing else StayWide()  # recomputation would fall out of it
    with wide:
        expected = gradients(model, weigh(padded_sum(one_by_one(model, prompts, responses)), zero))
    if checkpointing:
        model.gradient_checkpointing_enable()
    with wide:
        ours = gradients(model, weigh(list_logps(model, prompts, responses, layout="tree"), zero))
    assert largest_error(ours, expected) < (1e-6 if checkpointing else 1e-10)


def test_gradients_do_not_depend_on_the_threads():
    """The last state of the prompt predicts sixty tokens; their gradients are summed in one order."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        )
    )
    responses = [[[(7 * i + j) % 50 for j in range(12)] for i in range(60)]]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [gradients(model, list_logps(model, [[1, 2, 3]], responses).sum()) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_the_backward_of_a_flat_loss_is_zero():
    model, (prompts, responses) = build("llama"), lists()
    grads = gradients(model, list_logps(model, prompts, responses).sum() * 0.0)
    assert all(bool((g == 0).all()) for g in grads.values())


def test_the_backward_multiplies_active_rows_alone(monkeypatch):
    model, (prompts, responses) = build("llama"), lists((4,), ((5, 6, 7),))
    products = []
    product = gemm.linear
    monkeypatch.setattr(gemm, "linear", lambda x, w, b=None: products.append((*x.shape, len(w))) or product(x, w, b))
    sums = list_logps(model, prompts, responses)
    products.clear()
    sums[0, 1].backward()
    linear_layers = [m.weight.shape for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    wanted = [(4 + 5, out, into) for out, into in linear_layers] + [(out, 4 + 5, into) for out, into in linear_layers]
    assert sorted(products) == sorted([*wanted, (6, 16, VOCABULARY), (6, VOCABULARY, 16), (VOCABULARY, 6, 16)])


@pytest.mark.parametrize("active", [None, (True, False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("shapes", [((1, 12, 4), (1, 12, 4)), ((1, 12, 4), (1, 12, 1)), ((4,), (1, 12, 4))], ids=str)
def test_products_go_backward_over_active_rows_alone(shapes, active):
    forest = tree_row([[3] * 4], [[[5] * 4, [6] * 3, [7] * 4]]).forest
    assert forest.size == 12
    torch.manual_seed(2)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    grad = torch.randn(1, 12, 4, dtype=torch.float64)
    for on, span in zip(active or (), forest.trees[0].responses, strict=False):
        grad[:, slice(*span)] *= on
    expected = torch.autograd.grad(a * b, (a, b), grad)
    with fast_linears(nn.Identity(), forest):
        out = a * b
    assert "Product" in out.grad_fn.name()
    if active is not None:
        forest.note_gradient(
            torch.tensor([float(on) for on, n in zip(active, (4, 3, 4), strict=True) for _ in range(n)])
        )
        assert len(forest.active_rows(out.device)) < 12
    for found, wanted in zip(torch.autograd.grad(out, (a, b), grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if active is None else 1e-14)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_the_other_matrix_kernel_gives_the_same(monkeypatch, layout, checkpointing):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    prompts, responses = lists()
    exact = build("gpt2")
    expected = gradients(exact, weigh(list_logps(exact, prompts, responses)))
    model, kernel, calls = build("gpt2").float(), torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(gemm, "faster", lambda: True)
    monkeypatch.setattr(gemm, "SMALLEST", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(1) or kernel(*a))
    if checkpointing:
        model.gradient_checkpointing_enable()
    ours = gradients(model, weigh(list_logps(model, prompts, responses, layout=layout)))
    assert len(calls) > 3 * 8
    assert largest_error({n: g.double() for n, g in ours.items()}, expected) < 1e-4


def test_layers_under_torchs_own_checkpoint_wrapper_are_left_alone():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, (prompts, responses) = build("gpt2"), lists()
    expected = list(gradients(model, weigh(list_logps(model, prompts, responses))).values())
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, type(model.transformer.h[0])))
    ours = list(gradients(model, weigh(list_logps(model, prompts, responses))).values())
    assert largest_error(dict(enumerate(ours)), dict(enumerate(expected))) < 1e-10


def test_token_logps_are_per_token_and_in_order():
    model, (prompts, responses) = build("gpt2"), lists()
    ours, reference = token_logps(model, prompts, responses), one_by_one(model, prompts, responses)
    for mine, theirs in zip(ours, reference, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=0)


def test_a_long_prompt_and_empty_responses():
    model, (prompts, responses) = build("gpt2"), lists((40, 1), ((2, 0, 3), (0,)))
    for layout in ("tree", "padded"):
        ours = list_logps(model, prompts, responses, layout=layout)
        torch.testing.assert_close(ours, padded_sum(one_by_one(model, prompts, responses)), rtol=1e-11, atol=1e-12)
        assert ours[0, 1] == ours[1, 0] == ours[1, 2] == 0
    assert list_logps(model, prompts, [[[]], []]).tolist() == [[0.0], [0.0]]


def test_prompts_need_a_token():
    with pytest.raises(ValueError, match="at least one token"):
        list_logps(build("gpt2"), [[]], [[[3]]])


# --- after our attention is in place -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_that_ran_trees_behaves_as_before(name, tmp_path):
    model, (prompts, responses) = build(name, torch.float32).eval(), lists()
    ids = torch.tensor([prompts[0], [0] * 5 + prompts[2]])
    mask = (ids != 0).long()
    before = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    greedy = model.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False)
    list_logps(model, prompts, responses, layout="tree")
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[:, -1], before)
    assert torch.equal(model.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False), greedy)
    model.save_pretrained(tmp_path)
    assert attention.PREFIX not in (tmp_path / "config.json").read_text()
    list_logps(copy.deepcopy(model), prompts, responses, layout="tree")


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_fall_back_to_padded_rows(name):
    model, (prompts, responses) = build(name), lists()
    assert not supports_tree(model)
    layout, reason = choose_layout(model, prompts, responses)
    assert layout == "padded"
    assert model.config.model_type in reason
    reference = padded_sum(one_by_one(model, prompts, responses))
    torch.testing.assert_close(list_logps(model, prompts, responses), reference, rtol=1e-6, atol=0, check_dtype=False)
    with pytest.raises(InputError, match="padded"):
        list_logps(model, prompts, responses, layout="tree")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_batch_chooses_the_tree_and_leaves_the_model_as_it_was(dtype):
    model, (prompts, responses) = build("llama", dtype), lists()
    model.model.layers[0].eval()
    layout, reason = choose_layout(model, prompts, responses)
    assert layout == "tree"
    assert "differ by" in reason
    assert [m.training for m in model.modules()] == [
        m is model or "layers.0" not in n for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_first_batch_falls_back_where_packing_is_wrong(monkeypatch, dtype):
    model, (prompts, responses) = build("llama", dtype), lists()
    assert supports_tree(model)  # and then something is wrong with this one
    right = attention.tree_attention
    monkeypatch.setattr(
        attention, "tree_attention", lambda module, q, k, v, *a, **kw: right(module, q, k.roll(1, 2), v, *a, **kw)
    )
    layout, reason = choose_layout(model, prompts, responses)
    assert layout == "padded"
    assert "more than" in reason


def test_a_model_that_changes_its_logits_unseen_is_refused(monkeypatch):
    model, (prompts, responses) = build("gpt2"), lists()
    original = model.forward

    def doubled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(InputError, match="change their logits"):
        choose_layout(model, prompts, responses)


def test_unknown_layouts_are_named():
    with pytest.raises(InputError, match="tree"):
        list_logps(build("gpt2"), [[3]], [[[4]]], layout="packed")


# --- the head ----------------------------------------------------------------------------------------------------


def head_case(dtype, bias, positions=37, vocabulary=101):
    torch.manual_seed(0)
    hidden = torch.randn(positions, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    shift = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, shift, torch.randint(vocabulary, (positions,))


def naive(hidden, weight, bias, labels, scale, cap):
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 0.5, None), (True, 1.5, 3.0)])
@pytest.mark.parametrize(("tile", "chunk"), [(1000, 1000), (16, 10)])
def test_the_chunked_head_equals_log_softmax(monkeypatch, dtype, tolerance, bias, scale, cap, tile, chunk):
    monkeypatch.setattr("rankalign.rows.head.TILE", tile)
    monkeypatch.setattr("rankalign.rows.head.CHUNK", chunk)
    hidden, weight, shift, labels = head_case(dtype, bias)
    inputs = [t for t in (hidden, weight, shift) if t is not None]
    slope = torch.randn(len(labels), dtype=dtype)
    slope[::3] = 0.0
    expected = naive(hidden, weight, shift, labels, scale, cap)
    ours = label_logps(Head(weight, shift, scale, cap), hidden, labels)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, inputs, slope)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, slope), wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < tolerance


def test_extreme_logits_stay_finite():
    weight = torch.tensor([[1000.0], [-1000.0], [999.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    ours = label_logps(Head(weight), hidden, torch.tensor([2, 1]))
    assert ours.tolist() == pytest.approx([-1.3132616875182228, 0.0])
    ours.sum().backward()
    assert bool(torch.isfinite(weight.grad).all() & torch.isfinite(hidden.grad).all())


def test_half_precision_is_summed_in_fp32(monkeypatch):
    monkeypatch.setattr("rankalign.rows.head.CHUNK", 16)
    hidden, weight, _, labels = head_case(torch.bfloat16, False, positions=640)
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = naive(exact_h, exact_w, None, labels, 1.0, None)
    ours = label_logps(Head(weight), hidden, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected.sum(), exact_w)[0]
    (mine,) = torch.autograd.grad(ours.sum(), weight)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), wanted, rtol=2**-8, atol=1e-3)  # one rounding, whatever the chunks


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    hidden, weight, shift, labels = head_case(torch.float64, True)
    expected = torch.autograd.grad(naive(hidden, weight, shift, labels, 1.0, None).sum(), hidden)[0]
    ours = label_logps(Head(weight.detach(), shift.detach()), hidden, labels)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), hidden)[0], expected, rtol=1e-11, atol=1e-13)
    assert ours.grad_fn.next_functions[1][0] is None


def test_autocast_reaches_the_model_and_not_the_head():
    model, (prompts, responses) = build("llama", torch.float32), lists()
    exact = list_logps(model, prompts, responses)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = list_logps(model, prompts, responses)
        layout, _ = choose_layout(model, prompts, responses)
    assert layout == "tree"
    assert mixed.dtype == torch.float32
    assert 1e-4 < float((mixed - exact).detach().abs().max()) < 2.0
    mixed.sum().backward()


# --- adapters and wrappers ---------------------------------------------------------------------------------------


def adapted(targets, **more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    return peft.get_peft_model(build("gpt_neox"), config)


def test_lora_runs_on_trees_with_and_without_its_adapter():
    model, (prompts, responses) = adapted(["query_key_value", "dense_h_to_4h"]), lists()
    reference = padded_sum(one_by_one(model, prompts, responses))
    expected = gradients(model, weigh(reference))
    ours = list_logps(model, prompts, responses, layout="tree")
    torch.testing.assert_close(ours, reference, rtol=1e-11, atol=0)
    assert largest_error(gradients(model, weigh(ours)), expected) < 1e-10
    with model.disable_adapter():
        off = padded_sum(one_by_one(model, prompts, responses))
        torch.testing.assert_close(list_logps(model, prompts, responses), off, rtol=1e-11, atol=0)
    assert not torch.allclose(off, reference)


def test_a_head_trained_whole_beside_lora_is_the_one_that_counts():
    model, (prompts, responses) = adapted(["query_key_value"], modules_to_save=["lm_head"]), lists()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight *= 1.5
    ours = list_logps(model, prompts, responses)
    torch.testing.assert_close(ours, padded_sum(one_by_one(model, prompts, responses)), rtol=1e-11, atol=0)
    with model.disable_adapter():
        off = padded_sum(one_by_one(model, prompts, responses))
        torch.testing.assert_close(list_logps(model, prompts, responses), off, rtol=1e-11, atol=0)


def test_lora_on_the_head_is_refused():
    with pytest.raises(InputError, match="head carries an adapter"):
        list_logps(adapted(["lm_head"]), [[3]], [[[4]]])


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="LoRA"):
        list_logps(peft.get_peft_model(build("gpt2"), config), [[3]], [[[4]]])


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_gradients_are_synchronised_once(one_process):
    model, (prompts, responses) = build("gpt2"), lists()
    expected = gradients(model, weigh(list_logps(model, prompts, responses)))
    wrapped = model.forward = model.forward  # as accelerate leaves it
    parallel = nn.parallel.DistributedDataParallel(model)
    buckets = []

    def count(state, bucket):
        buckets.append(bucket.is_last())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, count)
    assert largest_error(gradients(model, weigh(list_logps(parallel, prompts, responses))), expected) < 1e-12
    assert sum(buckets) == 1
    model.zero_grad()
    backward_two_pass(parallel, prompts, responses, weigh, 20)
    assert sum(buckets) == 2
    assert largest_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-10
    assert vars(model)["forward"] == wrapped


# --- two passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("budget", [1, 16, 30, 1000])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral-window", "gemma2", "gptj", "gpt_oss", "deepseek_v3", "gemma4"]
)
def test_two_passes_give_the_gradient_of_one(name, layout, budget):
    model, (prompts, responses) = build(name), lists()
    with StayWide():
        sums = list_logps(model, prompts, responses, layout=layout)
        loss = weigh(sums.sigmoid())
        expected = gradients(model, loss)
        model.zero_grad()
        result = backward_two_pass(model, prompts, responses, lambda x: weigh(x.sigmoid()), budget, layout=layout)
    torch.testing.assert_close(result[0], loss.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(result[1], sums.detach(), rtol=1e-11, atol=0)
    assert largest_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-10


def test_two_passes_train_adapters():
    model, (prompts, responses) = adapted(["query_key_value"]), lists()
    expected = gradients(model, weigh(list_logps(model, prompts, responses)))
    model.zero_grad()
    backward_two_pass(model, prompts, responses, weigh, 16)
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert largest_error(trained, {n: expected[n] for n in trained}) < 1e-10


def test_two_passes_refuse_what_they_cannot_run():
    with pytest.raises(ValueError, match="no response"):
        backward_two_pass(build("gpt2"), [[3]], [[[]]], weigh, 10)
    with pytest.raises(ValueError, match="at least one token"):
        backward_two_pass(build("gpt2"), [[]], [[[3, 4], [5, 6]]], weigh, 1)


def test_two_passes_under_checkpointing():
    model, (prompts, responses) = build("gpt2"), lists()
    expected = gradients(model, weigh(list_logps(model, prompts, responses)))
    model.gradient_checkpointing_enable()
    model.zero_grad()
    backward_two_pass(model, prompts, responses, weigh, 16)
    assert largest_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-10


def widths(model: nn.Module) -> list[int]:
    """Tokens of every forward pass that keeps a graph, as they come."""
    seen: list[int] = []

    def note(_, args, kwargs):
        if torch.is_grad_enabled():
            tokens = kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs_embeds"][..., 0]
            seen.append(tokens.numel())

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_two_passes_hold_no_more_than_the_budget_however_long_the_list():
    for candidates in (4, 16):
        model, (prompts, responses) = build("gpt2"), lists((8,), ((5,) * candidates,))
        seen = widths(model)
        backward_two_pass(model, prompts, responses, weigh, 8 + 2 * 4)
        # Two responses at a time behind the prompt, which is in the last row with the two that are left.
        assert seen == [8] * (candidates // 2 - 1) + [8 + 8]


def test_two_passes_run_no_response_without_a_gradient_again():
    model, (prompts, responses) = build("gpt2"), lists()
    zero = ((0, 1), (0, 2), (0, 5), (1, 0), (1, 1), (2, 0))
    expected = gradients(model, weigh(list_logps(model, prompts, responses), zero))
    model.zero_grad()
    seen = widths(model)
    backward_two_pass(model, prompts, responses, lambda x: weigh(x, zero), 29)
    assert seen == [4 + 6 + 1 + 1, 9 + 4 + 2 + 2]  # the last list, whose graph is kept, then what counts of the first
    assert largest_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-10


@pytest.mark.parametrize("zero", [some for n in range(5) for some in combinations(range(4), n)], ids=str)
def test_two_passes_on_a_split_list_whatever_has_a_gradient(zero):
    model, (prompts, responses) = build("llama"), lists((6, 3), ((5, 3, 4, 2), (2, 2)))
    for order in ((0, 1), (1, 0)):  # the list that is split stands first, and last
        mask = tuple((order.index(0), n) for n in zero)
        some_prompts, some_responses = [prompts[p] for p in order], [responses[p] for p in order]
        expected = gradients(model, weigh(list_logps(model, some_prompts, some_responses), mask))
        model.zero_grad()
        backward_two_pass(model, some_prompts, some_responses, lambda x, mask=mask: weigh(x, mask), 12)
        assert largest_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-10


def test_two_passes_notice_dropout():
    model, (prompts, responses) = build("gpt2"), lists()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    with pytest.raises(InputError, match="dropout"):
        backward_two_pass(model, prompts, responses, weigh, 16)


def test_units_fill_the_budget_keep_the_order_and_split_only_what_must_be():
    prompts, responses = [[0] * 4, [0], [0]], [[[0] * 3, [0] * 3, [0] * 9], [[0] * 2, [0]], [[0]]]
    everything = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    long, short = everything[:3], everything[3:]
    assert list(units(prompts, responses, everything, 10, True)) == [[long[:2], long[2:]], [short]]
    assert list(units(prompts, responses, everything, 14, False)) == [[long[:2], long[2:]], [short]]
    assert list(units(prompts, responses, everything, 2, True)) == [[[c] for c in long], [short[:2]], [short[2:]]]
    assert list(units(prompts, responses, everything, 19, True)) == [[everything]]
    assert list(units(prompts, responses, everything, 18, True)) == [[everything[:5]], [short[2:]]]
