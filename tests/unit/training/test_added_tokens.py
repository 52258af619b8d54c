"""``--add_tokens``: what the copy of the start model holds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.training.added_tokens import start_model
from rankalign.training.arguments import parse_settings
from rankalign.training.settings import ModelSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))


def added(names: str, model: str = "tiny", **more: object) -> str:
    return start_model(parse_settings({"model": model, "add_tokens": names, "use_cpu": True, **more}).model_settings)


def test_new_rows_are_the_mean_and_old_rows_keep_their_bits() -> None:
    folder = added("<a>, <b>")
    old, new = models.load_policy("tiny", dtype="float32"), models.load_policy(folder, dtype="float32")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = old.state_dict()[name], new.state_dict()[name]
        assert after.shape[0] == 264
        assert torch.equal(after[:262], before)
        for row in after[262:]:
            torch.testing.assert_close(row, before.mean(0), rtol=1e-6, atol=1e-7)
    assert AutoConfig.from_pretrained(folder).vocab_size == 264
    tokenizer = models.load_tokenizer(folder)
    assert tokenizer("<b>x<a>", add_special_tokens=False).input_ids[::2] == [263, 262]
    assert tokenizer.pad_token == tiny.PAD
    assert added("<a>,<b>") == folder != added("<b>,<a>")


def test_a_padding_token_takes_the_place_of_one_that_stood_in(tmp_path: Path) -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tiny.build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(str(tmp_path / "model"))
    assert models.load_tokenizer(str(tmp_path / "model")).pad_token == tiny.EOS
    folder = added("[PAD]", str(tmp_path / "model"))
    assert models.load_tokenizer(folder).pad_token_id == 262
    assert AutoConfig.from_pretrained(folder).pad_token_id == 262


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        ("<a>,,<b>", {}, "different names"),
        ("<a>,<a>", {}, "different names"),
        ("<a>", {"use_lora": True}, "would never be learnt"),
        ("<a>", {"method": "reward"}, "models that write"),
    ],
)
def test_what_cannot_work_is_refused(names: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        added(names, **more)


def test_without_new_tokens_the_model_is_the_one_named() -> None:
    assert start_model(ModelSettings(model="tiny")) == "tiny"
