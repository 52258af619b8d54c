"""`rankalign plan` against what `rankalign train` then does, and its allocator against one worked by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rankalign import cli
from rankalign.data.records import CandidateSet, Response, write
from rankalign.storage import manifest
from rankalign.training import heap
from rankalign.training import plan as planning
from rankalign.training.arguments import parse_settings
from rankalign.training.plan import plan
from rankalign.training.plan.memory import ALIGN, SPARE, Heap
from rankalign.training.run import train


def data(folder: Path, count: int = 7) -> Path:
    """Seven prompts of different lengths; one has no scored answer, and so is dropped."""
    rng = random.Random(1)
    sets = []
    for i in range(count):
        texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(4, 30))) for _ in range(rng.randint(2, 4))]
        scores: list[dict[str, float]] = [{"toy": float(n)} if i != 2 else {} for n in range(len(texts))]
        responses = [Response(text, scores=score) for text, score in zip(texts, scores, strict=True)]
        sets.append(CandidateSet(f"p{i}", "prompt " + "x" * rng.randint(0, 40), responses))
    path = folder / "scored.jsonl"
    write(path, sets)
    return path


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    fixed = {"model": "tiny", "data": str(data(folder)), "output_dir": str(folder / "run"), "use_cpu": True}
    return {**fixed, "save_strategy": "no", "disable_tqdm": True, **more}


@pytest.mark.parametrize(
    "more",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1.5},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 2, "max_length": 40},
        pytest.param(
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3, "use_lora": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "per_device_train_batch_size": 4,
                "num_train_epochs": 1,
                "dataloader_drop_last": True,
                "max_candidates": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_counts_are_those_of_the_run(tmp_path: Path, more: dict[str, Any]) -> None:
    content = settings(tmp_path, **more)
    planned = plan(parse_settings(content))
    train(parse_settings(content))
    found = manifest.read(tmp_path / "run")
    assert found is not None
    assert planned["steps"] == found["steps"]
    assert planned["counts"] == found["counts"]
    assert planned["prompts"] == found["counts"]["prompts"] == 6
    assert planned["dropped"] == found["counts"]["dropped_prompts"] == 1
    cut = found["counts"].get("prompt_truncated", 0) + found["counts"].get("response_truncated", 0)
    assert planned["truncated"] == cut
    assert (cut > 0) == ("max_length" in more)
    assert planned["epochs"] == pytest.approx(found["metrics"]["epoch"], abs=0.35)


def test_memory_of_weights_states_and_gradients_is_arithmetic(tmp_path: Path) -> None:
    content = settings(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    items = plan(parse_settings(content))["memory"]
    embedding, attention, mlp = 262 * 32, 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64
    numbers = 2 * embedding + 2 * (attention + mlp + 2 * 32) + 32
    assert items["weights"] == pytest.approx(4 * numbers, rel=0.01)
    assert items["gradients"] == pytest.approx(4 * numbers, rel=0.01)
    assert items["optimiser"] == pytest.approx(8 * numbers, rel=0.01)


def test_two_passes_take_less(tmp_path: Path) -> None:
    def activations(**more: Any) -> int:
        items = plan(parse_settings(settings(tmp_path, per_device_train_batch_size=6, **more)))["memory"]
        return int(items["activations"])

    whole = activations()
    assert activations(two_pass="always", token_budget=60) < whole


def test_heap_keeps_a_hole_that_an_aligned_block_of_its_size_does_not_fit() -> None:
    within, spare = Heap(), SPARE + ALIGN
    first, fence = within.take(1000), within.take(16)
    top = within.top
    within.give(first)
    again = within.take(1000)  # 1000 + what aligning takes is more than the hole
    assert again[0] >= top
    small = within.take(1000 - spare - 32)
    assert small[0] == first[0]
    for block in (again, small, fence):
        within.give(block)
    assert within.take(within.top - 16 - spare - 16)[0] == 0  # all holes are one again


def test_blocks_that_glibc_maps_by_themselves_leave_nothing() -> None:
    within = Heap()
    block = within.take(heap.MAPPED)
    assert (within.top, within.mapped) == (0, heap.MAPPED + 16)
    within.give(block)
    assert within.resident == 0
    within.take(heap.MAPPED - 32)
    assert (within.top, within.mapped) == (heap.MAPPED - 16, 0)


def test_holes_are_counted_up_to_what_training_lets_them_grow_to() -> None:
    within, piece = Heap(), 1 << 20
    blocks = [within.take(piece - 16) for _ in range(201)]
    for block in blocks[::2][:-1]:
        within.give(block)  # a hundred holes, each between two blocks that stay
    assert within.used == 101 * piece
    assert within.resident == 101 * piece + heap.GROWTH < within.top == 201 * piece


def test_the_peak_has_a_range_and_a_reason(tmp_path: Path) -> None:
    found = plan(parse_settings(settings(tmp_path)))
    low, high = found["peak_memory_range_bytes"]
    alive = found["peak_memory_bytes"] - found["memory"]["allocator"]
    between = heap.growth(alive)
    assert low <= alive <= found["peak_memory_bytes"] <= alive + between <= high < 2 * low
    assert f"{between >> 20} MiB between two modules" in found["peak_memory_range_reason"]
    assert heap.growth(400 << 20) == 64 << 20  # an eighth, and no less than this
    assert heap.growth(4 << 30) == 512 << 20


def test_the_upper_end_says_whether_a_run_fits_into_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_settings(settings(tmp_path))
    monkeypatch.setattr(planning, "_memory_here", lambda _: 1 << 60)
    monkeypatch.setattr(planning, "_resident", lambda: 600 << 20)
    _, high = plan(config)["peak_memory_range_bytes"]
    for room, fits in ((high - 1, False), (high, True)):
        monkeypatch.setattr(planning, "_memory_here", lambda _, room=room: room)
        assert (plan(config)["launcher"] == "one process") == fits


def test_command_prints_the_keys_and_launchers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{key}={value}" for key, value in settings(tmp_path).items()]
    assert cli.main(["plan", "--json", *words, "--devices", "4", "--device_memory", "24GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"prompts", "dropped", "truncated", "steps", "peak_memory_bytes", "seconds"} <= set(found)
    assert found["seconds"] is None
    assert found["peak_memory_bytes"] == sum(found["memory"].values())
    assert found["launcher"] == "one process"
    assert not (tmp_path / "run").exists()
    sizes = found["launchers"]
    assert sizes["DDP"] > sizes["one process"] > sizes["FSDP2 or ZeRO-2"]


def test_a_second_copy_for_references_lies_beside_whole_weights_alone(tmp_path: Path) -> None:
    found, without = (
        plan(parse_settings(settings(tmp_path, loss="dpo", references=when)), "24GiB", 4)
        for when in ("ahead", "before")
    )
    copy = found["memory"]["reference"]
    assert copy == found["memory"]["weights"] - 8 * 4  # parameters, and not the buffer of frequencies
    assert "reference" not in without["memory"]
    process = found["memory"]["process"] - without["memory"]["process"]
    for name, size in found["launchers"].items():  # sharded runs have all references before the first update
        whole = name in ("one process", "DDP")
        assert size - without["launchers"][name] - process == (copy if whole else 0), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--loss", "rrfh"], "unknown loss"),
        (["--device_memory", "much"], "write it like 24GiB"),
        (["--method", "ppo", "--reward", "some:function"], "plan reads a file of candidates"),
        (["--model", "nowhere/at/all"], "no such folder"),
    ],
)
def test_bad_settings_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    words = ["--model", "tiny", "--data", str(data(tmp_path)), "--use_cpu", "true", *more]
    assert cli.main(["plan", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_probe_gives_seconds(tmp_path: Path) -> None:
    assert plan(parse_settings(settings(tmp_path)), probe=True)["seconds"] > 0
