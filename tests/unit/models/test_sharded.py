"""Outlines and what fills them, in one process: every family has the numbers of a plain load, buffers included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rankalign.errors import InputError
from rankalign.models import sharded, tiny
from rankalign.training import spread
from rankalign.training.arguments import parse_settings
from tests.numerics.test_logps import FAMILIES, SMALL


def build(family: str, folder: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    name, config = FAMILIES[family]
    made = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**config))
    made.save_pretrained(folder, **more)
    return folder


def outlined(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return sharded.outline(AutoModelForCausalLM, AutoConfig.from_pretrained(folder), dtype)


def filled(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = outlined(folder, dtype)
    assert all(p.is_meta for p in model.parameters())
    sharded.fill(model, sharded.sources(model, "m", folder), {}, torch.device("cpu"))
    return model.eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_filled_outline_is_the_plain_model(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path, max_shard_size="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = filled(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for read in ("named_parameters", "named_buffers"):
            one, other = dict(getattr(ours, read)()), dict(getattr(plain, read)())
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in other)
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_folder_of_the_model_without_its_head_is_read(tmp_path: Path) -> None:
    folder = build("gpt2", tmp_path / "whole")
    file = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, dict(plain.named_parameters())[n]) for n, p in filled(folder).named_parameters())


def loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """What a process of several loads; alone, it has all rows."""
    monkeypatch.setattr(spread, "by_parts", lambda _: "fsdp")
    monkeypatch.setattr(spread, "_shard", lambda _, model: (model, torch.device("cpu")))
    config = parse_settings({"data": "none", "output_dir": str(tmp_path / "run"), "use_cpu": True, **more})
    torch.manual_seed(3)
    model = spread.load(config, tiny.build_tokenizer())
    assert model is not None
    assert not any(p.is_meta for p in model.parameters())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mine = {name.replace(".base_layer.", "."): p for name, p in base.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(mine[name], p) for name, p in plain.named_parameters() if name != "lm_head.weight")
    return model


def test_dora_on_an_outline_starts_from_the_lengths_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build("llama", tmp_path / "model", max_shard_size="3KB")
    model = loaded(folder, tmp_path, monkeypatch, model=str(folder), use_lora=True, use_dora=True, lora_r=4)
    lengths = {name: p for name, p in model.named_parameters() if "magnitude" in name}
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert len(lengths) == 7 * plain.config.num_hidden_layers
    for name, p in lengths.items():
        row = plain.get_parameter(name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight")
        assert torch.allclose(p, row.double().norm(dim=1).float(), rtol=1e-6)
        assert p.requires_grad
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():  # a fresh adapter changes nothing
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_trains_on_over_an_outline(dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("llama", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=dora)
    begun = get_peft_model(plain, config).eval()
    with torch.no_grad():
        for name, p in begun.named_parameters():
            if "magnitude" in name:
                p *= 1.1
    begun.save_pretrained(tmp_path / "adapter")
    model = loaded(folder, tmp_path, monkeypatch, model=str(tmp_path / "adapter"), use_lora=True)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in begun.named_parameters() if p.requires_grad}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, begun(input_ids=ids).logits)


def test_an_adapter_with_a_head_of_its_own_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build("llama", tmp_path / "model")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AssertionError):
        loaded(folder, tmp_path, monkeypatch, model=str(tmp_path / "adapter"), use_lora=True)
    assert "weights beside its own (modules_to_save), so each process reads them all" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [False, True])
def test_a_reward_model_on_an_outline(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("llama", tmp_path / "model")
    model = loaded(folder, tmp_path, monkeypatch, model=str(folder), method="reward", use_lora=lora)
    head = [p for name, p in model.named_parameters() if "score" in name.split(".")]
    assert len(head) == 1 + lora
    assert all(torch.equal(p, head[0]) for p in head)
    usual = model.config.initializer_range
    assert 0.5 * usual < float(head[0].detach().std()) < 1.5 * usual
    trained = tmp_path / "graded"
    made = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    made.save_pretrained(trained)
    again = loaded(folder, tmp_path, monkeypatch, model=str(trained), method="reward", use_lora=lora)
    heads = [p for name, p in again.named_parameters() if "score" in name.split(".")]
    assert all(torch.equal(p, made.score.weight) for p in heads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight has shape \[3\], and \[16\] is"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Any, said: str, tmp_path: Path) -> None:
    file = build("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=said):
        sharded.sources(outlined(tmp_path), "m", tmp_path)


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model", max_shard_size="3KB")
    shutil.copytree(folder, tmp_path / "other")
    min((tmp_path / "other").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"the shard .* is missing"):
        sharded.sources(outlined(folder), "m", tmp_path / "other")
    for file in (tmp_path / "other").glob("*.safetensors*"):
        file.unlink()
    torch.save({}, tmp_path / "other" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds no weights \(\*.safetensors\)"):
        sharded.sources(outlined(folder), "m", tmp_path / "other")


EXPERTS: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=1),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SMALL, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=8, decoder_sparse_step=1
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**FAMILIES["gpt_neox"][1]),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_joined_from_files_and_written_as_they_were(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside transformers' own loading, whose files have a tensor an expert, and its own saving."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(EXPERTS[family])
    made.save_pretrained(tmp_path / "model", max_shard_size="6KB")
    ours, plain = filled(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert all(torch.equal(p, dict(plain.named_parameters())[name]) for name, p in ours.named_parameters())
    monkeypatch.setattr(sharded, "FILE", "6KB")
    sharded._save_whole(ours, tmp_path / "again", True)
    first, again = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (tmp_path / "model", tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], t) for name, t in first.items())
    assert any("experts.2." in name for name in again) == (family != "gpt_neox")


def test_saving_in_files_is_what_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied weights once, an index, the class by its own name."""
    monkeypatch.setattr(sharded, "FILE", "3KB")
    for family in ("llama-tied", "gemma2"):
        folder = build(family, tmp_path / family)
        sharded._save_whole(filled(folder), tmp_path / f"{family}-again", True)
        plain, again = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / f"{family}-again"))
        index = json.loads((tmp_path / f"{family}-again" / "model.safetensors.index.json").read_text())
        assert "lm_head.weight" not in index["weight_map"]
        assert type(plain) is type(again)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True))
