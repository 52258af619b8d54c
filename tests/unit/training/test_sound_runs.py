"""Before the first update: model, tokenizer, lists that do not go together. After the last: what is in the folder."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.training.arguments import parse_settings
from rankalign.training.plan import plan
from rankalign.training.run import train


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "scored.jsonl"
    answers = [Response("yes", scores={"j": 1.0}), Response("no", scores={"j": 0.0})]
    write(path, [CandidateSet(f"p{i}", f"Is it a zebra {i}?", answers) for i in range(2)])
    return str(path)


def settings(data: str, folder: Path, model: Path | str, **more: Any) -> Any:
    usual = {
        "model": str(model),
        "data": data,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 1,
        "template": "raw",
    }
    return parse_settings({**usual, "output_dir": str(folder / "run"), **more})


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(models.resolve("tiny"), folder / "base"))


# --- before ------------------------------------------------------------------------------------------------------


def without_end(folder: Path) -> Path:
    base = copied(folder)
    tokenizer = tiny.build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    return base


def too_long(folder: Path) -> Path:
    base = copied(folder)
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(base)
    return base


def short(folder: Path) -> Path:
    tokenizer = tiny.build_tokenizer()
    shape = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("method", ["rank", "reward"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_end, "names no end-of-sequence token"),
        (too_long, "'p0' holds token id 262, and the model has 262 embeddings"),
        (short, "'p0' takes .* tokens, and gpt2 has 16 positions: --max_length 16 or less"),
    ],
)
def test_what_does_not_go_together_is_refused(make: Any, reason: str, method: str, data: str, tmp_path: Path) -> None:
    config = settings(data, tmp_path, make(tmp_path), method=method)
    for attempt in (train, plan):
        with pytest.raises(InputError, match=reason):
            attempt(config)


def test_texts_that_fit_after_a_cut_train(data: str, tmp_path: Path) -> None:
    assert train(settings(data, tmp_path, short(tmp_path), max_length=16))["steps"] == 1


# --- after -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.5, "length_penalty": 0.5},
    ],
)
def test_generation_settings_that_contradict_themselves_are_mended(
    broken: dict[str, Any], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copied(tmp_path)
    told = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**told, **broken}))
    assert train(settings(data, tmp_path, base, save_steps=1))["steps"] == 1
    assert "generation_config.json contradicts itself" in capsys.readouterr().err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config
    saved.validate(strict=True)
    assert (saved.eos_token_id, saved.do_sample) == (told["eos_token_id"], broken["do_sample"])
    assert saved.temperature == (broken["temperature"] if saved.do_sample else None)


def types(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        return {stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("keep", "expected"), [(False, "BF16"), (True, "F32")])
def test_weights_are_saved_in_the_type_of_the_base(
    keep: bool, expected: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copied(tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    more = {"learning_rate": 1e-2, "save_steps": 1, "keep_float32": keep}
    train(settings(data, tmp_path, base, **more))
    run = tmp_path / "run"
    assert (types(run), types(run / "checkpoint-1")) == ({expected}, {"F32"})
    assert ("saved in bfloat16" in capsys.readouterr().err) is not keep
    masters = AutoModelForCausalLM.from_pretrained(run / "checkpoint-1", dtype=torch.float32).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(run).state_dict()
    for name, weight in masters.items():
        assert torch.equal(saved[name].float(), weight if keep else weight.bfloat16().float()), name
    assert json.loads((run / "config.json").read_text())["dtype"] == ("float32" if keep else "bfloat16")


@pytest.mark.parametrize("lora", [False, True])
def test_others_may_read_what_the_umask_lets_them(lora: bool, data: str, tmp_path: Path) -> None:
    train(settings(data, tmp_path, "tiny", use_lora=lora, save_steps=1))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    (tmp_path / "new").write_text("")
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: expected for path in files}
