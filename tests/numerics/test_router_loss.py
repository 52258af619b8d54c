"""The routers' load-balancing loss is plain transformers' on the padded batch, however rows are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from rankalign.errors import InputError
from rankalign.models import adapters, delta, load, merge, tiny
from rankalign.rows.experts import balance, own_coefficient
from rankalign.rows.logps import choose_layout, list_logps
from rankalign.rows.tree import padded_rows
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.e2e.support import lists as scored_lists
from tests.e2e.support import same_files
from tests.numerics.test_logps import GROUPED, MOE, gradients, largest_error, lists, weigh

MAKES = {
    "mixtral": ("Mixtral", GROUPED | MOE),
    "qwen3_moe": ("Qwen3Moe", GROUPED | MOE | {"num_experts": 4}),
    "gpt_oss": ("GptOss", GROUPED | MOE | {"sliding_window": 6}),
}


def build(name: str, **more: Any) -> Any:
    kind, settings = MAKES[name]
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(getattr(transformers, kind + "Config")(**settings | more)).train()


def plain(model: Any, prompts: Any, responses: Any) -> torch.Tensor:
    """What transformers makes of the padded batch."""
    rows = padded_rows(prompts, responses)
    mask = torch.zeros_like(rows.ids)
    texts = [(p, r) for p, candidates in zip(prompts, responses, strict=True) for r in candidates]
    for row, (p, r) in enumerate(texts):
        mask[row, : len(p) + max(len(r) - 1, 0)] = 1
    return model(input_ids=rows.ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", MAKES)
def test_it_is_that_of_the_padded_batch(name: str, layout: str, checkpointing: bool) -> None:
    model, (prompts, responses) = build(name), lists()
    expected = plain(model, prompts, responses)
    wanted = gradients(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    listener = balance(model)
    sums = list_logps(model, prompts, responses, layout=layout)
    found = listener.take()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Answers whose log-probabilities have no gradient have one of their routers' still.
    got = gradients(model, found + weigh(sums, ((0, 1), (1, 0), (2, 2))) * 0.0)
    assert largest_error(got, wanted) < 1e-4
    with torch.no_grad():
        list_logps(model, prompts, responses, layout=layout)
    assert not listener._found


def test_models_without_such_a_loss_are_named() -> None:
    with pytest.raises(InputError, match="llama"):
        balance(AutoModelForCausalLM.from_config(transformers.LlamaConfig(**GROUPED)))


def test_a_reentrant_checkpoint_is_refused() -> None:
    model, (prompts, responses) = build("mixtral"), lists()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    balance(model)
    with pytest.raises(InputError, match="no gradient reaches the routers"):
        list_logps(model, prompts, responses)


def test_the_models_own_weight_counts_where_its_config_asks_for_it() -> None:
    assert own_coefficient(build("mixtral", router_aux_loss_coef=0.3).config) == 0
    assert own_coefficient(build("mixtral", router_aux_loss_coef=0.3, output_router_logits=True).config) == 0.3
    assert own_coefficient(transformers.LlamaConfig()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKES)
def test_grouped_products_are_taken_and_the_layout_is_tried_with_them(name: str, dtype: torch.dtype) -> None:
    model = build(name, experts_implementation=None).to(dtype).eval()
    assert model.config._experts_implementation == "grouped_mm"
    assert choose_layout(model, *lists())[0] == "tree"


# --- a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "base"
    tokenizer = tiny.build_tokenizer()
    settings = MAKES["mixtral"][1] | {"vocab_size": len(tokenizer), "router_aux_loss_coef": 0.5}
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(transformers.MixtralConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(base: Path, output: Path, **settings: Any) -> dict[str, Any]:
    content = {
        "model": str(base), "data": str(scored_lists(output.with_suffix(".jsonl"))), "output_dir": str(output),
        "max_steps": 1, "template": "raw", "max_length": 60, "learning_rate": 1e-3, "warmup_steps": 0,
        "save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, **settings,
    }  # fmt: skip
    train(parse_settings(content))
    log = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line for line in log if "loss" in line)


def test_it_is_logged_and_weighs_as_asked(base: Path, tmp_path: Path) -> None:
    without = run(base, tmp_path / "without")
    tree, padded = (
        run(base, tmp_path / layout, router_aux_loss_coef=0.25, layout=layout) for layout in ("tree", "padded")
    )
    assert "router_aux_loss" not in without
    assert tree["router_aux_loss"] == pytest.approx(padded["router_aux_loss"], rel=1e-5)
    assert tree["router_aux_loss"] >= 1.9  # two of four experts a token: 2 where all are used alike
    for line in (tree, padded):
        assert line["loss"] == pytest.approx(without["loss"] + 0.25 * line["router_aux_loss"], rel=1e-5)


def test_what_it_cannot_go_with_is_refused(base: Path, tmp_path: Path) -> None:
    for bad, words in (
        ({"router_aux_loss_coef": -1}, "no weight"),
        ({"router_aux_loss_coef": 0.1, "method": "reward"}, "rank or sft"),
        ({"router_aux_loss_coef": 0.1, "two_pass": "always"}, "two_pass"),
        ({"router_aux_loss_coef": 0.1, "token_budget": 8}, "raise it"),
    ):
        with pytest.raises(InputError, match=words):
            run(base, tmp_path / "refused", **bad)


# --- LoRA on experts ---------------------------------------------------------------------------------------------

EXPERTS = "mlp.experts.gate_up_proj,mlp.experts.down_proj"


def test_adapters_of_experts_train_and_merge(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "lora", use_lora=True, lora_r=2, lora_target_parameters=EXPERTS, learning_rate=0.1)
    adapted = load.load_policy(str(tmp_path / "lora"))
    moved = [n for n, p in adapted.named_parameters() if "experts" in n and "lora_B" in n and bool(p.abs().sum() > 0)]
    assert moved
    prompts, responses = [[5, 9, 7]], [[[30, 31, 32], [33, 34]]]
    with torch.no_grad():
        found = list_logps(adapted, prompts, responses)
        merge.merge_lora(str(tmp_path / "lora"), str(tmp_path / "merged"))
        merged = list_logps(load.load_policy(str(tmp_path / "merged")), prompts, responses)
        start = list_logps(load.load_policy(str(base)), prompts, responses)
    torch.testing.assert_close(merged, found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(start, found, atol=1e-3)
    delta.make(str(base), str(tmp_path / "lora"), str(tmp_path / "delta"), merge_adapter=True)
    delta.apply(str(base), str(tmp_path / "delta"), str(tmp_path / "recovered"))
    assert same_files(tmp_path / "recovered", tmp_path / "merged")


def test_what_peft_cannot_adapt_is_named() -> None:
    with pytest.raises(InputError, match=r"gate_up_prj.*gate_up_proj"):
        adapters.add_lora(build("mixtral"), parameters=["experts.gate_up_prj"])
    with pytest.raises(InputError, match="without --lora_dropout"):
        adapters.add_lora(build("mixtral"), dropout=0.1, parameters=EXPERTS.split(","))
    assert isinstance(adapters.add_lora(build("mixtral"), dropout=0.0, parameters=EXPERTS.split(",")), nn.Module)


def test_routers_that_give_more_than_a_product_get_no_adapter() -> None:
    settings = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
    model = AutoModelForCausalLM.from_config(transformers.Llama4TextConfig(**settings)).eval()
    prompts, responses = lists()
    with torch.no_grad():
        before = list_logps(model, prompts, responses)
        adapted = adapters.add_lora(model, r=2, dropout=0.0).eval()
        torch.testing.assert_close(list_logps(adapted, prompts, responses), before)
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert any("q_proj" in name for name in names)
    assert not any("router" in name for name in names)
