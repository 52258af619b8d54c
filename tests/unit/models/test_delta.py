"""Deltas: what comes back is what went in, bit for bit, and anything else is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rankalign.errors import InputError
from rankalign.models import adapters, delta, tiny, weights
from rankalign.models import load as models
from rankalign.models.delta import arithmetic as delta_legacy

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A model folder: weights in ``shards`` files with an index, and two files beside them."""
    folder.mkdir(parents=True)
    names = list(tensors)
    where = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "tokenizer.json").write_text('{"words": ["ü"]}\n', encoding="utf-8")
    return folder


def tensors(
    seed: int, dtype: torch.dtype = torch.float32, rows: int = 10, near: float = 0.0
) -> dict[str, torch.Tensor]:
    """A small model's worth of weights; ``near`` is how far from those of seed 0 (0: unrelated)."""
    generator = torch.Generator().manual_seed(0 if near else seed)
    made = {
        "embed.weight": torch.randn(10, 6, generator=generator),
        "layer.weight": torch.randn(7, 5, generator=generator),
        "norm.weight": torch.ones(6),
        "scale": torch.tensor(0.25),
        "empty": torch.zeros(0, 3),
    }
    if near:
        noise = torch.Generator().manual_seed(seed)
        made = {name: value + near * torch.randn(value.shape, generator=noise) for name, value in made.items()}
    more = torch.randn(rows - 10, 6, generator=torch.Generator().manual_seed(seed + 99))
    made["embed.weight"] = torch.cat([made["embed.weight"], more])
    return {name: value.to(dtype) for name, value in made.items()}


def bits(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """All weights of a folder as safetensors itself reads them."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                value = handle.get_tensor(name)
                found[name] = (value.dtype, value.shape, bytes(value.reshape(-1).view(torch.uint8).numpy().data))
    return found


def round_trip(tmp_path: Path, base: Path, target: Path) -> Path:
    made = delta.make(str(base), str(target), str(tmp_path / "delta"))
    applied = delta.apply(str(base), str(tmp_path / "delta"), str(tmp_path / "back"))
    assert made["sha256"] == applied["sha256"] == models.weights_fingerprint(target)
    assert made["bit_exact"] is applied["bit_exact"] is True
    assert made["tensors"] == applied["tensors"] == len(bits(target))
    return tmp_path / "back"


def same_files(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


@pytest.mark.parametrize("rows", [10, 11, 8], ids=["same vocabulary", "a new token", "fewer rows"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_file_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shards: int, rows: int) -> None:
    goal = tensors(1, dtype, max(rows, 10), near=1e-3)
    goal["embed.weight"] = goal["embed.weight"][:rows]
    base = save(tmp_path / "base", tensors(0, dtype))
    target = save(tmp_path / "target", goal, shards)
    back = round_trip(tmp_path, base, target)
    assert bits(back) == bits(target)
    assert same_files(back, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_patterns_that_arithmetic_loses_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    odd = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max, -1.0]
    value = torch.tensor(odd, dtype=dtype)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    value = torch.cat([value, (value[4:5].view(word) | 1).view(dtype)])  # a NaN with a payload
    base = save(tmp_path / "base", {"w": value.flip(0)})
    target = save(tmp_path / "target", {"w": value})
    back = load_file(round_trip(tmp_path, base, target) / "model.safetensors")["w"]
    assert torch.equal(back.view(word), value.view(word))


def test_what_is_stored_is_the_xor_of_the_bits(tmp_path: Path) -> None:
    import zlib

    old, new = tensors(0)["layer.weight"], tensors(1, near=1e-3)["layer.weight"]
    base, target = save(tmp_path / "base", {"w": old}), save(tmp_path / "target", {"w": new})
    delta.make(str(base), str(target), str(tmp_path / "delta"))
    packed = bytes(load_file(tmp_path / "delta" / "delta-00001-of-00001.safetensors")["w"].tolist())
    (length,) = struct.unpack("<I", packed[:4])
    assert len(packed) == 4 + length
    expected = (old.view(torch.int32) ^ new.view(torch.int32)).view(torch.uint8).reshape(-1, 4).T.reshape(-1)
    assert list(zlib.decompress(packed[4:])) == expected.tolist()


def test_close_models_give_a_small_delta_and_equal_ones_next_to_none(tmp_path: Path) -> None:
    old = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    near = (old.float() + 1e-3 * torch.randn(300, 300, generator=torch.Generator().manual_seed(1))).bfloat16()
    base = save(tmp_path / "base", {"w": old})
    for name, value, most in (("near", near, 0.5), ("equal", old, 0.01)):
        delta.make(str(base), str(save(tmp_path / name, {"w": value})), str(tmp_path / f"{name}-delta"))
        size = (tmp_path / f"{name}-delta" / "delta-00001-of-00001.safetensors").stat().st_size
        assert size < most * old.nbytes + 500


def test_blocks_join_where_a_tensor_is_longer_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "BLOCK", 64)
    base = save(tmp_path / "base", tensors(0))
    target = save(tmp_path / "target", tensors(1, rows=12, near=1e-3))
    assert same_files(round_trip(tmp_path, base, target), target)


def test_tensors_without_a_like_in_the_base_are_stored_whole_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = {**tensors(1, near=1e-3), "head.weight": torch.randn(10, 6)}
    goal["layer.weight"] = goal["layer.weight"].half()
    goal["norm.weight"] = torch.ones(3, 2)
    base, target = save(tmp_path / "base", tensors(0)), save(tmp_path / "target", goal)
    made = delta.make(str(base), str(target), str(tmp_path / "delta"))
    assert sorted(made["whole"]) == ["head.weight", "layer.weight", "norm.weight"]
    assert "3 tensors have no like in the base" in capsys.readouterr().err
    delta.apply(str(base), str(tmp_path / "delta"), str(tmp_path / "back"))
    assert same_files(tmp_path / "back", target)


def test_the_recovered_folder_loads_and_a_tied_model_stays_tied(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=262, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), tiny.build_tokenizer()
    model.save_pretrained(tmp_path / "base")
    models.add_tokens(model, tokenizer, ["[PAD]"])
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    back = round_trip(tmp_path, tmp_path / "base", tmp_path / "target")
    loaded = models.load_policy(str(back), dtype="float32")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert models.weights_fingerprint(loaded) == models.weights_fingerprint(model)
    assert models.load_tokenizer(str(back)).convert_tokens_to_ids("[PAD]") == 262


def test_an_adapter_is_kept_or_merged(tmp_path: Path) -> None:
    adapted = adapters.add_lora(models.load_policy("tiny", dtype="float32").cpu(), r=2, alpha=4)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(3))
    adapter = str(tmp_path / "adapter")
    adapted.save_pretrained(adapter)
    delta.make("tiny", adapter, str(tmp_path / "kept"))
    delta.apply("tiny", str(tmp_path / "kept"), str(tmp_path / "back"))
    assert bits(tmp_path / "back") == bits(Path(adapter))
    assert (tmp_path / "back" / "adapter_config.json").exists()

    delta.make("tiny", adapter, str(tmp_path / "merged"), merge_adapter=True)
    delta.apply("tiny", str(tmp_path / "merged"), str(tmp_path / "whole"))
    ids = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        gap = (
            adapted.eval()(ids).logits - models.load_policy(str(tmp_path / "whole"), dtype="float32").cpu()(ids).logits
        )
    assert gap.abs().max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "back", "kept", "merged", "whole"]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with ``base``, ``target`` (two shards) and ``delta``."""
    save(tmp_path / "base", tensors(0))
    save(tmp_path / "target", tensors(1, near=1e-3), shards=2)
    delta.make(str(tmp_path / "base"), str(tmp_path / "target"), str(tmp_path / "delta"))
    return tmp_path


def test_one_flipped_bit_anywhere_in_a_delta_is_detected(made: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    for file in sorted((made / "delta").iterdir()):
        whole = file.read_bytes()
        places = torch.randint(len(whole) * 8, (60,), generator=generator).tolist()
        for place in [0, 7, len(whole) * 8 - 1, *places]:
            broken = bytearray(whole)
            broken[place // 8] ^= 1 << place % 8
            file.write_bytes(broken)
            with pytest.raises(InputError):
                delta.verify(str(made / "delta"))
            with pytest.raises(InputError):
                delta.apply(str(made / "base"), str(made / "delta"), str(made / "back"))
        file.write_bytes(whole)
    assert not (made / "back").exists()
    delta.verify(str(made / "delta"), str(made / "base"), str(made / "target"))


def test_another_base_is_refused_naming_the_first_tensor(made: Path) -> None:
    wrong = tensors(0)
    wrong["layer.weight"].view(torch.int32)[3, 2] ^= 1
    wrong["norm.weight"] += 1
    save(made / "wrong", wrong)
    for attempt in (
        lambda: delta.apply(str(made / "wrong"), str(made / "delta"), str(made / "back")),
        lambda: delta.verify(str(made / "delta"), base=str(made / "wrong")),
    ):
        with pytest.raises(
            InputError, match=r"not the model that the delta was made with: tensor layer.weight has other"
        ):
            attempt()
    assert not (made / "back").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scale"), "tensor scale is missing"),
        (lambda t: t.update(more=torch.zeros(2)), "tensor more is too many"),
        (lambda t: t.update(scale=torch.tensor(0.25).half()), r"tensor scale is F16 \[\], not F32 \[\]"),
    ],
)
def test_a_base_of_another_make_is_refused(made: Path, change, message: str) -> None:
    wrong = tensors(0)
    change(wrong)
    save(made / "wrong", wrong)
    with pytest.raises(InputError, match=message):
        delta.apply(str(made / "wrong"), str(made / "delta"), str(made / "back"))


def test_a_changed_target_is_found_by_verify(made: Path) -> None:
    assert delta.verify(str(made / "delta"), target=str(made / "target"))["tensors"] == 5
    file = made / "target" / "model-00002-of-00002.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-1] ^= 128
    file.write_bytes(broken)
    with pytest.raises(InputError, match=r"target .* tensor \w+.* has other values"):
        delta.verify(str(made / "delta"), target=str(made / "target"))
    broken[-1] ^= 128
    file.write_bytes(broken)
    (made / "target" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json is not as it was made"):
        delta.verify(str(made / "delta"), target=str(made / "target"))


def test_a_missing_shard_is_named(made: Path) -> None:
    (made / "delta" / "delta-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"delta-00002-of-00002.safetensors is missing"):
        delta.apply(str(made / "base"), str(made / "delta"), str(made / "back"))
    (made / "target" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard model-00001-of-00002.safetensors that .*index.json names is missing"):
        delta.make(str(made / "base"), str(made / "target"), str(made / "other"))


def test_a_weight_file_that_was_cut_short_is_named(made: Path) -> None:
    file = made / "target" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"model-00001-of-00002.safetensors: is no whole safetensors file"):
        delta.make(str(made / "base"), str(made / "target"), str(made / "other"))
    assert not (made / "other").exists()


def test_existing_folders_are_never_touched(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    for attempt in (
        lambda: delta.make(str(made / "base"), str(made / "target"), str(made / "delta")),
        lambda: delta.apply(str(made / "base"), str(made / "delta"), str(made / "target")),
    ):
        with pytest.raises(InputError, match="is there already"):
            attempt()
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_pickles_and_folders_of_the_target_are_left_out_and_said(made: Path) -> None:
    (made / "target" / "checkpoint-5").mkdir()
    (made / "target" / "training_args.bin").write_bytes(b"\x80\x04.")
    result = delta.make(str(made / "base"), str(made / "target"), str(made / "again"))
    assert result["left_out"] == ["checkpoint-5", "training_args.bin"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "..", "sub/evil", "pytorch_model.bin"])
def test_a_made_up_delta_cannot_write_outside_or_smuggle_pickles(made: Path, name: str) -> None:
    path = made / "delta" / "delta.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"].pop("config.json")
    manifest["sha256"] = delta._self_hash(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="refused"):
        delta.apply(str(made / "base"), str(made / "delta"), str(made / "back"))


def test_a_made_up_delta_that_does_not_fit_together_gets_one_sentence(made: Path) -> None:
    path = made / "delta" / "delta.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["header"] = manifest["shards"][0]["header"].replace("[10,6]", "[0,6]")
    manifest["sha256"] = delta._self_hash(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not fit together"):
        delta.apply(str(made / "base"), str(made / "delta"), str(made / "back"))
    assert not (made / "back").exists()


def test_a_tensor_that_comes_out_otherwise_is_refused(made: Path) -> None:
    path = made / "delta" / "delta.json"
    manifest = json.loads(path.read_text())
    manifest["target"]["scale"] = manifest["target"]["scale"][:-1] + "!"
    manifest["sha256"] = delta._self_hash(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="tensor scale does not come out as it was"):
        delta.apply(str(made / "base"), str(made / "delta"), str(made / "back"))
    assert not (made / "back").exists()


def test_memory_stays_at_some_blocks_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "BLOCK", 1 << 18)
    monkeypatch.setattr(weights, "BLOCK", 1 << 18)
    big = {"w": torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))}  # 16 MB, 64 blocks
    base = save(tmp_path / "base", big)
    target = save(tmp_path / "target", {"w": big["w"] + 1e-3})
    tracemalloc.start()
    try:
        delta.make(str(base), str(target), str(tmp_path / "delta"))
        delta.apply(str(base), str(tmp_path / "delta"), str(tmp_path / "back"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * (1 << 18)
    assert same_files(tmp_path / "back", target)


# --- the script --------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).resolve().parents[3] / "train_scripts" / "recover_weights.sh"
CIRCLE = [
    "make --base default --target runs/rrhf --delta runs/delta",
    "apply --base default --delta runs/delta --target runs/recovered",
    "verify --base default --delta runs/delta --target runs/recovered",
]


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        ("B D T", ["apply --base B --delta D --target T"]),
        ("B D T --new_rows mean", ["apply --base B --delta D --target T --new_rows mean"]),
        ("--base B --target T --delta D", ["apply --base B --target T --delta D"]),
        ("--base-model-path B --target-model-path T --delta-path D", ["apply --base B --target T --delta D"]),
        ("--base-model-path=B --target=T --delta-path=D", ["apply --base=B --target=T --delta=D"]),
        ("", CIRCLE),
    ],
)
def test_the_script_takes_old_and_new_arguments(tmp_path: Path, words: str, commands: list[str]) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "runs" / "rrhf").mkdir(parents=True)
    (tmp_path / "runs" / "rrhf" / "manifest.json").touch()
    run = [*("bash", str(SCRIPT)), *words.split()]
    done = subprocess.run(run, env={**os.environ, "PYTHON": str(fake)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"-m rankalign delta {command}" for command in commands]
    assert done.returncode == 0


# --- arithmetic deltas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_arithmetic_delta_is_added_in_its_own_type(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    base, change = tensors(0), tensors(1, dtype)
    folder = save(tmp_path / "delta", change, shards=2)
    if form == "bin":
        for number, file in enumerate(sorted(folder.glob("*.safetensors")), start=1):
            state = {**load_file(file), f"l.{number}.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
            torch.save(state, folder / f"pytorch_model-{number:05d}-of-00002.bin")
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()
    result = delta.apply(str(save(tmp_path / "base", base)), str(folder), str(tmp_path / "back"))
    assert result["bit_exact"] is False
    assert result["tensors"] == len(base)
    assert sum("inv_freq" in name for name in result["left_out"]) == (2 if form == "bin" else 0)
    expected = {name: base[name].to(dtype) + change[name] for name in base}
    assert bits(tmp_path / "back") == bits(save(tmp_path / "expected", expected))
    assert result["sha256"] == models.weights_fingerprint(tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} >= {"config.json", "model.safetensors.index.json"}


def test_rows_of_new_tokens_start_from_zero_or_the_mean_and_no_row_is_lost(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tensors(0))
    change = tensors(1, rows=12)
    folder = save(tmp_path / "delta", change)
    old = tensors(0)["embed.weight"]
    for how, row in (("zero", torch.zeros(2, 6)), ("mean", old.mean(0).expand(2, 6))):
        delta.apply(str(base), str(folder), str(tmp_path / how), new_rows=how)
        back = load_file(tmp_path / how / "model.safetensors")["embed.weight"]
        assert torch.equal(back, torch.cat([old, row]) + change["embed.weight"])
    with pytest.raises(InputError, match="unknown new_rows 'median'"):
        delta.apply(str(base), str(folder), str(tmp_path / "median"), new_rows="median")


def test_an_arithmetic_delta_of_another_make_is_refused(tmp_path: Path) -> None:
    base = str(save(tmp_path / "base", tensors(0)))
    for number, (name, value) in enumerate([("more", torch.zeros(2)), ("layer.weight", torch.zeros(7, 4))]):
        folder = save(tmp_path / f"delta{number}", {**tensors(1), name: value})
        with pytest.raises(InputError, match=f"{name}.*another base"):
            delta.apply(base, str(folder), str(tmp_path / "back"))
    with pytest.raises(InputError, match=r"has no delta.json"):
        delta.verify(str(folder))


class Trap:
    def __reduce__(self):
        return (print, ("code of the pickle ran",))


def test_a_pickle_with_code_in_it_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "delta", tensors(1))
    (folder / "model.safetensors").unlink()
    torch.save({"w": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: cannot be read as plain tensors"):
        delta_legacy.apply(save(tmp_path / "base", tensors(0)), folder, tmp_path / "back")
    assert "code of the pickle ran" not in capsys.readouterr().out


def test_an_old_bin_base_serves_as_well(tmp_path: Path) -> None:
    save(tmp_path / "base", tensors(0))
    target = save(tmp_path / "target", tensors(1, near=1e-3))
    delta.make(str(tmp_path / "base"), str(target), str(tmp_path / "delta"))
    torch.save(tensors(0), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    delta.apply(str(tmp_path / "base"), str(tmp_path / "delta"), str(tmp_path / "back"))
    assert same_files(tmp_path / "back", target)
