"""Two processes against one at the same global batch: weights, logs, ledger, folders, resume.

Sums of float32 in another order are all that may differ.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from rankalign.data.records import CandidateSet, Response, write
from rankalign.storage.jsonl import read_rows
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.e2e.distributed import LAUNCHED, ROOT, furthest, launch, log, settings, tensors, write_data

METHODS: dict[str, dict[str, Any]] = {
    "rrhf": {"loss": "rrhf"},
    "dpo": {"loss": "dpo"},
    "rrhf-lora": {"loss": "rrhf", "use_lora": True},
    "dpo-lora": {"loss": "dpo", "use_lora": True},
    "reward": {"method": "reward"},
    "sft": {"method": "sft"},
    "dpo-bema": {"loss": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_bema": True},
    "dpo-moving-lora": {"loss": "dpo", "use_lora": True, "sync_ref_model": True, "ref_model_sync_steps": 3},
}
# By all launchers but these; references move where the weights are whole.
ONLY = {"reward": ("ddp", "zero3"), "sft": ("ddp", "zero3"), "dpo-bema": ("ddp",), "dpo-moving-lora": ("ddp",)}
SLOW = [
    pytest.param(kind, method, marks=pytest.mark.slow)
    for kind in LAUNCHED
    for method in METHODS
    if (kind, method) != ("ddp", "rrhf") and kind in ONLY.get(method, LAUNCHED)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def alone(one_thread: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process, by method, each made once."""
    folder, made = tmp_path_factory.mktemp("alone"), dict[str, Path]()

    def run(method: str, steps: int = 10) -> Path:
        name = f"{method}-{steps}"
        if name not in made:
            one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True}
            train(parse_settings(settings(data, folder / name, **METHODS[method], **one, max_steps=steps)))
            made[name] = folder / name
        return made[name]

    return run


@pytest.mark.parametrize(("kind", "method"), [("ddp", "rrhf"), *SLOW])
def test_two_processes_are_one(kind: str, method: str, data: Path, alone: Any, tmp_path: Path) -> None:
    one, two = alone(method), tmp_path / "two"
    words = settings(data, two, **METHODS[method], per_device_train_batch_size=1)
    done = launch(kind, tmp_path / "facts.json", words)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json.0").read_text())
    assert (facts["type"], facts["processes"]) == (LAUNCHED[kind][0], 2)
    assert facts["wrapper"] == LAUNCHED[kind][1] or (kind == "fsdp" and facts["wrapper"] == f"FSDP{_model(method)}")
    for folder in ("", "checkpoint-5", "checkpoint-10"):
        assert furthest(one / folder, two / folder) < 1e-5
    assert furthest(one / "checkpoint-5", one / "checkpoint-10") > 1e-3  # the bound above means something
    moves = "sync_ref_model" in METHODS[method]
    assert any(name.startswith("reference ") for name in tensors(two / "checkpoint-10")) == moves
    for ours, theirs in zip(log(one), log(two), strict=True):
        assert ours.keys() == theirs.keys()
        # The share of an epoch is counted in micro-batches, of which one process has other ones than two.
        assert {**theirs, "epoch": ours["epoch"]} == pytest.approx(ours, rel=1e-4, abs=1e-5)
    _check_ledger(one, two)
    assert done.stderr.count("data: 9 prompts") == 1  # only the first process speaks
    assert done.stdout.count("already_finished") == 1
    assert (two / "manifest.json").exists()
    _check_loads(method, two)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("fsdp", "dpo"), *(pytest.param(*some, marks=pytest.mark.slow) for some in (("zero3", "rrhf"), ("zero2", "dpo")))],
)
def test_token_budget_under_sharding(kind: str, method: str, data: Path, alone: Any, tmp_path: Path) -> None:
    """So small a budget that lists run in two passes, and one process has more parts to run than the other."""
    one, two = alone(method, 4), tmp_path / "two"
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "token_budget": 30, "max_steps": 4}
    done = launch(kind, tmp_path / "facts.json", settings(data, two, **METHODS[method], **more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(one, two) < 1e-5
    first, second = (json.loads((tmp_path / f"facts.json.{rank}").read_text()) for rank in range(2))
    assert first["runs"] == second["runs"] > 12  # four, if the budget were not kept to
    assert first["own"] != second["own"]
    assert max(first["own"], second["own"]) <= first["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("method", ["rrhf", "dpo-lora"])
def test_sharded_in_16_bits(kind: str, method: str, data: Path, alone: Any, tmp_path: Path) -> None:
    """Beside a run of one process in float32: as near as 16 bits come, and no nearer; weights stay float32 on disk.

    DeepSpeed begins at weights of 8 bits of mantissa, and trains float32 copies of them, all digits of which are saved.
    """
    one, two = alone(method, 4), tmp_path / "two"
    more = {"per_device_train_batch_size": 1, "max_steps": 4, "bf16": True}
    done = launch(kind, tmp_path / "facts.json", settings(data, two, **METHODS[method], **more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "facts.json.0").read_text())["type"] == LAUNCHED[kind][0]
    ours, theirs = ([line["loss"] for line in log(folder)] for folder in (one, two))
    assert theirs == pytest.approx(ours, rel=0.03)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-5
    start = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors(one).items()}
    rounded = max(float(t.abs().max()) for t in tensors(one).values()) * 2**-8 if kind != "fsdp" else 0
    moved = 2 * sum(line["learning_rate"] for line in log(one))  # by AdamW
    assert furthest(one, two) < rounded + moved
    assert any(not torch.equal(t, t.bfloat16().float()) for t in tensors(two).values())
    assert any(not torch.equal(t, start[name]) for name, t in tensors(two).items())


@pytest.mark.slow
def test_memory_follows_the_budget_under_sharding(tmp_path: Path) -> None:
    rng, peaks = random.Random(5), dict[int, int]()
    texts = [["".join(rng.choices("abcdefgh ", k=150)) for _ in range(8)] for _ in range(4)]
    answers = [[Response(text, finished=True, scores={"toy": float(i)}) for i, text in enumerate(row)] for row in texts]
    write(tmp_path / "data.jsonl", [CandidateSet(f"p{i}", "prompt", row) for i, row in enumerate(answers)])
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "save_strategy": "no"}
    for budget in (200, 1600, 4096):
        words = settings(tmp_path / "data.jsonl", tmp_path / str(budget), loss="rrhf", **more, token_budget=budget)
        done = launch("fsdp", tmp_path / "facts.json", words, RANKALIGN_TEST_PEAK="1")
        assert done.returncode == 0, done.stderr[-3000:]
        peaks[budget] = max(json.loads((tmp_path / f"facts.json.{rank}").read_text())["peak"] for rank in range(2))
    print(peaks)
    assert furthest(tmp_path / "200", tmp_path / "4096") < 1e-5
    assert peaks[200] < 0.3 * peaks[1600]
    assert peaks[1600] < 0.7 * peaks[4096]


def _model(method: str) -> str:
    return "PeftModelForCausalLM" if "lora" in method else "LlamaForCausalLM"


def _check_ledger(one: Path, two: Path) -> None:
    """Every prompt once an epoch, and none of those that only kept a process busy."""
    ours, theirs = (
        {(row["id"], row["epoch"], row["step"]): row["loss"] for _, row in read_rows(folder / "ledger.jsonl")}
        for folder in (one, two)
    )
    assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def _check_loads(method: str, folder: Path) -> None:
    """The final folder and a checkpoint in plain transformers or peft, without us."""
    for path in (folder, folder / "checkpoint-5"):
        if "lora" in method:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path)
            assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
        elif method != "reward":
            model = AutoModelForCausalLM.from_pretrained(path)
            saved = tensors(path)
            assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2", "zero3"])
def test_interrupted_and_resumed_is_uninterrupted(kind: str, data: Path, alone: Any, tmp_path: Path) -> None:
    one, two = alone("rrhf"), tmp_path / "two"
    words = settings(data, two, **METHODS["rrhf"], per_device_train_batch_size=1, dataloader_num_workers=1)
    cut = launch(kind, tmp_path / "facts.json", words, RANKALIGN_TEST_STOP="7")  # a signal to the second process alone
    assert cut.returncode != 0
    assert "interrupted" in cut.stderr
    assert not (two / "manifest.json").exists()
    assert (two / "checkpoint-7").exists()
    done = launch(kind, tmp_path / "facts.json", words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    assert furthest(one, two) < 1e-6
    assert [line["step"] for line in log(two)] == list(range(1, 11))
    for ours, theirs in zip(log(one), log(two), strict=True):
        assert {**theirs, "epoch": ours["epoch"]} == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert sorted(p.name for p in two.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-7"]  # save_total_limit 2


@pytest.mark.parametrize("path", sorted((ROOT / "train_scripts" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_launch_files_are_valid(path: Path) -> None:
    config: Any = load_config_from_file(str(path))
    wanted = {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == DistributedType[wanted[path.stem]]
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


@pytest.mark.parametrize("path", sorted((ROOT / "train_scripts" / "deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_deepspeed_files_are_valid(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = json.loads(path.read_text())
    zero = DeepSpeedZeroConfig(**content["zero_optimization"])
    assert int(zero.stage) == int(path.stem[-1])
    unknown = set(zero.model_dump()) - set(DeepSpeedZeroConfig.model_fields)
    assert not unknown


@pytest.mark.slow
def test_even_rows_of_two_processes_are_one_update(data: Path, alone: Any, tmp_path: Path) -> None:
    """``--batch_by tokens`` deals the rows of an update out anew, so that each process has as many."""
    one, two = alone("rrhf"), tmp_path / "two"
    even = {"batch_by": "tokens", "token_budget": 64, "per_device_train_batch_size": 1}
    done = launch("ddp", tmp_path / "facts.json", settings(data, two, **METHODS["rrhf"], **even))
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in ("", "checkpoint-5", "checkpoint-10"):
        assert furthest(one / folder, two / folder) < 1e-5
    for ours, theirs in zip(log(one), log(two), strict=True):
        shared = {key: theirs[key] for key in ours if key != "epoch"}
        assert shared == pytest.approx({key: ours[key] for key in shared}, rel=1e-4, abs=1e-5)
    assert all(0 < line["row_fill"] <= 1 for line in log(two) if "loss" in line)
    _check_ledger(one, two)
