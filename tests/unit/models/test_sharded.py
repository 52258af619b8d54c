"""Outlines and what fills them, in one process: every family has the numbers of a plain load, buffers included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rankalign.errors import InputError
from rankalign.models import sharded
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


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt_neox"}))  # whose head has another name on disk
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


def test_families_whose_files_have_other_names_are_known() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    for family, renamed in {"llama": False, "gemma2": False, "gpt2": False, "gpt_neox": True}.items():
        name, config = FAMILIES[family]
        made = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**config))
        assert sharded.renamed_on_disk(made) == renamed
    made = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**SMALL, **experts))
    assert sharded.renamed_on_disk(made)


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
