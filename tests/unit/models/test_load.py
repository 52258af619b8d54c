"""Names, tokenizers, policies, reward models, adapters, fingerprints, and the folders they are kept in."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.models import adapters, devices, tiny
from rankalign.models import load as models
from rankalign.models.merge import merge_lora

IDS = torch.tensor([[1, 70, 80, 90, 100, 2]])


@pytest.fixture
def policy() -> LlamaForCausalLM:
    return tiny.build_model()


def small(tied: bool, rows: int = 262) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# --- loading -----------------------------------------------------------------------------------------------------


def words(*names: str, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        tokenizer_models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=names[0])
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("tokenizer", "pad"),
    [
        (words("<unk>", "a", "<pad>", "</s>", unk_token="<unk>", eos_token="</s>"), "<pad>"),
        (words("<unk>", "a", "</s>", unk_token="<unk>", eos_token="</s>"), "<unk>"),
        (words("x", "a", "</s>", eos_token="</s>"), "</s>"),
        (words("<unk>", "a", "p", unk_token="<unk>", pad_token="p"), "p"),
    ],
)
def test_a_padding_token_is_found_in_the_vocabulary(tmp_path: Path, tokenizer, pad: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    loaded = models.load_tokenizer(str(tmp_path))
    assert loaded.pad_token == pad
    assert len(loaded) == len(tokenizer)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    words("x", "a").save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="names no padding"):
        models.load_tokenizer(str(tmp_path))


def test_a_policy_loads_ready_to_use(policy: LlamaForCausalLM) -> None:
    loaded = models.load_policy("tiny", dtype="float32")
    assert not loaded.training
    assert loaded.device.type == models.device().type
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS.to(loaded.device)).logits.cpu(), policy(IDS).logits)
    assert models.load_policy("tiny", dtype="bfloat16").dtype == torch.bfloat16


def test_types_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device", lambda: torch.device("cpu"))
    assert models.pick_dtype("auto") == torch.float32
    with pytest.raises(InputError, match="float16 needs a GPU"):
        models.load_policy("tiny", dtype="float16")
    with pytest.raises(InputError, match="unknown dtype 'fp8'"):
        models.pick_dtype("fp8")
    monkeypatch.setattr(devices, "device", lambda: torch.device("cuda"))
    assert models.pick_dtype("auto") == torch.bfloat16
    assert models.pick_dtype("float16") == torch.float16


def test_without_network_a_hub_id_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_offline", lambda: True)
    for load in (models.load_policy, models.load_tokenizer, models.load_reward_model, models.local_folder):
        started = time.monotonic()
        with pytest.raises(InputError, match=r"model org/never-seen: .* hub cannot be reached"):
            load("org/never-seen")
        assert time.monotonic() - started < 5


def test_pickled_weights_are_refused(tmp_path: Path, policy: LlamaForCausalLM) -> None:
    policy.config.save_pretrained(tmp_path)
    torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        models.load_policy(str(tmp_path))


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path, policy: LlamaForCausalLM) -> None:
    policy.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks lm_head.weight"):
        models.load_policy(str(tmp_path))


def test_a_reward_model_loads_with_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = models.load_reward_model("tiny-rm", dtype="float32", new_head=False)
    with torch.no_grad():
        expected = tiny.build_tiny_reward_model()(IDS).logits
        torch.testing.assert_close(model(IDS.to(model.device)).logits.cpu(), expected)
    assert expected.shape == (1, 1)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert capsys.readouterr().err.count("random") == 0


def test_a_policy_becomes_a_reward_model_only_where_that_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"is no reward model, it lacks score.weight"):
        models.load_reward_model("tiny", new_head=False)
    model, _ = models.load_reward_model("tiny")
    assert model.num_labels == 1
    assert "score.weight is new" in capsys.readouterr().err


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    three = AutoModelForSequenceClassification.from_pretrained(models.resolve("tiny"), num_labels=3)
    three.save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score.weight has shape \[3, 32\], and \[1, 32\] is needed"):
        models.load_reward_model(str(tmp_path))


def test_all_ends_are_known(policy: LlamaForCausalLM) -> None:
    tokenizer = tiny.build_tokenizer()
    assert models.end_ids(policy, tokenizer) == {2}
    policy.generation_config.eos_token_id = [5, 7]
    assert models.end_ids(policy, tokenizer) == {2, 5, 7}
    policy.generation_config.eos_token_id = None
    assert models.end_ids(policy, tokenizer) == {2}


# --- adapters ----------------------------------------------------------------------------------------------------


def adapted(folder: Path) -> torch.Tensor:
    """Save an adapter that does something; returns its logits."""
    model = adapters.add_lora(models.load_policy("tiny", dtype="float32"), r=4, alpha=8, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(IDS.to(model.device)).logits.cpu()


def test_lora_trains_its_own_weights_only_and_says_how_many(
    policy: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        before = policy(IDS).logits
    model = adapters.add_lora(policy, r=4, alpha=8)
    trainable = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trainable)
    # r (in + out) for q, o (32, 32), k, v (32, 16), gate, up, down (32, 64), in two layers
    assert sum(trainable.values()) == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert "4,096 of" in capsys.readouterr().err
    model.eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, before)


def test_lora_goes_where_it_is_told(policy: LlamaForCausalLM) -> None:
    model = adapters.add_lora(policy, targets=["q_proj", "v_proj"])
    touched = {name.split(".")[-4] for name, weight in model.named_parameters() if weight.requires_grad}
    assert touched == {"q_proj", "v_proj"}


def test_an_adapter_saves_loads_and_merges(tmp_path: Path) -> None:
    logits = adapted(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == 4096
    assert all(value.abs().max() > 0 for value in saved.values())
    merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    ways = [
        models.load_policy("tiny", dtype="float32", adapter=str(tmp_path / "adapter")),
        models.load_policy(str(tmp_path / "adapter"), dtype="float32"),
        models.load_policy(str(tmp_path / "merged"), dtype="float32"),
    ]
    base, merged = (
        load_file(Path(where) / "model.safetensors") for where in (models.resolve("tiny"), tmp_path / "merged")
    )
    for layer in ("self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}"
        up, down = (saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 8 / 4 * up @ down)
    for model in ways:
        with torch.no_grad():
            assert (model(IDS.to(model.device)).logits.cpu() - logits).abs().max() < 1e-5
    assert len(models.load_tokenizer(str(tmp_path / "adapter"))) == 262
    with pytest.raises(InputError, match="is there already"):
        merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))


def test_an_adapter_finds_a_model_of_the_cache_on_another_machine(tmp_path: Path) -> None:
    adapted(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "/elsewhere/cache/" + Path(models.resolve("tiny")).name
    path.write_text(json.dumps(config))
    assert models.load_policy(str(tmp_path)).config.hidden_size == 32
    config["base_model_name_or_path"] = "/elsewhere/else"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"/elsewhere/else: no such folder"):
        models.load_policy(str(tmp_path))


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    for attempt in (
        lambda: models.load_policy("tiny", adapter=str(tmp_path)),
        lambda: merge_lora(str(tmp_path), str(tmp_path / "out")),
    ):
        with pytest.raises(InputError, match=r"adapter_config.json"):
            attempt()
    adapted(tmp_path / "a")
    with pytest.raises(InputError, match="is an adapter itself"):
        models.load_policy(str(tmp_path / "a"), adapter=str(tmp_path / "a"))


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [262, 270], ids=["full", "rows in reserve"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_at_the_mean_and_old_rows_keep_their_bits(tmp_path: Path, tied: bool, rows: int) -> None:
    model, tokenizer = small(tied, rows), tiny.build_tokenizer()
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert models.add_tokens(model, tokenizer, ["<a>", "<b>", "<|eos|>"]) == 2
    assert len(tokenizer) == 264
    after = [layer.weight.detach() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    for old, new in zip(before, after, strict=True):
        assert len(new) == max(264, rows)
        assert torch.equal(new[:262], old[:262])
        for row in new[262:264]:
            torch.testing.assert_close(row, old[:262].mean(0), rtol=1e-6, atol=1e-7)
        assert torch.equal(new[264:], old[264:])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_policy(str(tmp_path), dtype="float32")
    assert models.weights_fingerprint(loaded) == models.weights_fingerprint(model)
    ids = models.load_tokenizer(str(tmp_path))("<b>", add_special_tokens=False).input_ids
    assert ids == [263]
    assert torch.isfinite(loaded(torch.tensor([ids], device=loaded.device)).logits).all()


def test_known_tokens_change_nothing(policy: LlamaForCausalLM) -> None:
    before = models.weights_fingerprint(policy)
    assert models.add_tokens(policy, tiny.build_tokenizer(), ["<|eos|>", "<|user|>"]) == 0
    assert models.weights_fingerprint(policy) == before


# --- fingerprints ------------------------------------------------------------------------------------------------


def test_a_tokenizers_fingerprint_is_that_of_what_it_does(tmp_path: Path) -> None:
    first = models.tokenizer_fingerprint(tiny.build_tokenizer())
    assert len(first) == 16
    tokenizer = tiny.build_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    assert models.tokenizer_fingerprint(tokenizer) == first
    LlamaConfig().save_pretrained(tmp_path)
    assert models.tokenizer_fingerprint(models.load_tokenizer(str(tmp_path))) == first

    changed = [tiny.build_tokenizer() for _ in range(4)]
    changed[0].add_tokens(["new"])
    changed[1].backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits()
    changed[2].backend_tokenizer.post_processor = pre_post_none()
    changed[3].eos_token = "<|user|>"
    assert len({first, *map(models.tokenizer_fingerprint, changed)}) == 5


def pre_post_none():
    from tokenizers.processors import ByteLevel

    return ByteLevel()


def test_a_models_fingerprint_is_that_of_its_bits(tmp_path: Path, policy: LlamaForCausalLM) -> None:
    first = models.weights_fingerprint(policy)
    policy.save_pretrained(tmp_path / "one")
    policy.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert models.weights_fingerprint(tmp_path / "one") == models.weights_fingerprint(str(tmp_path / "many")) == first

    lines = [
        f"{name} F32 {list(value.shape)} {hashlib.sha256(value.numpy().tobytes()).hexdigest()}\n"
        for name, value in sorted(policy.state_dict().items())
    ]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == first

    policy.model.norm.weight.data.view(torch.int32)[3] ^= 1
    assert models.weights_fingerprint(policy) != first
    assert models.weights_fingerprint(policy.bfloat16()) != first


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = small(tied=True)
    model.save_pretrained(tmp_path)
    assert models.weights_fingerprint(model) == models.weights_fingerprint(tmp_path)


def test_an_adapter_names_its_base_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models.resolve("tiny"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapters.add_lora(models.load_policy("base", dtype="float32")).save_pretrained("adapter")
    monkeypatch.chdir(tmp_path / "base")
    assert models.load_policy(str(tmp_path / "adapter"), dtype="float32") is not None
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "whole")]) == 0
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved)  # a fresh adapter adds nothing


def test_an_adapter_that_does_not_fit_is_one_sentence() -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="no adapter fits"):
        adapters.add_lora(transformers.MambaForCausalLM(config))
