"""What `rankalign plan --device` foresees, against a census of the real step under FSDP2, over eight ranks
that are not there, and against arithmetic for one card."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from docs import fits
from rankalign import cli
from rankalign.training.arguments import parse_settings
from rankalign.training.plan import on_card
from rankalign.training.plan.cards import SHAPES, memory_of, shape
from rankalign.training.plan.on_card import Setup, made_up, stretches

GIB = 2**30
ROOM = memory_of("h100")


DEEPER = ((6, "llama-8b"), (2, "llama-70b"), (4, "llama-70b"), (16, "llama-70b"), (80, "llama-70b"))


def config(**more: Any) -> Any:
    return parse_settings({"model": "llama-8b", "use_cpu": True, "per_device_train_batch_size": 1, **more})


def peak(found: dict[str, Counter[str]]) -> int:
    """Without what is reckoned beside the tensors, which a census does not see."""
    return max(sum(n for k, n in items.items() if k not in ("split", "context")) for items in found.values())


@pytest.mark.parametrize(
    ("layers", "model"),
    [(2, "llama-8b"), *(pytest.param(*some, marks=pytest.mark.slow) for some in DEEPER)],
)
def test_fsdp2_on_eight_ranks_is_foreseen_within_15_percent(layers: int, model: str, monkeypatch: Any) -> None:
    command = [sys.executable, "-m", "tests.numerics.fsdp_census", model, str(layers)]
    counted = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
    real = on_card.build
    monkeypatch.setattr(on_card, "build", lambda s, r=False, d="float32", n=0: real(s, r, d, n or layers))
    plan = stretches(
        config(model=model, gradient_checkpointing=True, optim="adamw_torch"),
        made_up(512, 256, 4, 1),
        Setup(ROOM, 8, "fsdp2"),
    )
    print(f"{model}, {layers} layers: {peak(plan) / GIB:.2f} GiB foreseen, {counted['peak'] / GIB:.2f} counted")
    assert plan["second, optimiser"]["weights"] == pytest.approx(counted["shards"], rel=0.01)
    assert peak(plan) == pytest.approx(counted["peak"], rel=0.15)


def test_depth_is_foreseen_from_two_shallow_stacks(monkeypatch: Any) -> None:
    """All twelve layers run, beside what four and six foretell."""
    real = on_card.build
    monkeypatch.setattr(on_card, "build", lambda s, r=False, d="float32", n=0: real(s, r, d, n or 12))
    some = config(use_lora=True), made_up(256, 128, 4, 1), Setup(ROOM)
    foretold = peak(stretches(*some))
    monkeypatch.setattr(on_card, "DEPTHS", (4, 12))
    assert foretold == pytest.approx(peak(stretches(*some)), rel=0.01)


def test_weights_and_states_are_arithmetic() -> None:
    """8,030,261,248 numbers in Llama 3 8B as published; 0.5 + 1/64 + 1/4096 bytes a number in nf4."""
    numbers, outside = 8_030_261_248, 2 * 128256 * 4096
    part = made_up(64, 32, 2, 1)
    full = stretches(config(), part, Setup(ROOM))["second, optimiser"]
    assert full["weights"] == pytest.approx(4 * numbers, rel=1e-3)
    assert full["gradients"] == pytest.approx(4 * numbers, rel=1e-3)
    assert full["optimiser"] == pytest.approx(8 * numbers, rel=0.1)  # and the step's own, a matrix at a time
    four = stretches(config(use_lora=True, load_in_4bit=True), part, Setup(ROOM))["second, forward"]
    packed = (numbers - outside) * (0.5 + 1 / 64 + 1 / 4096) + 2 * outside + 4 * 41_943_040
    assert four["weights"] == pytest.approx(packed, rel=0.01)


@pytest.mark.parametrize(
    ("more", "setup", "bytes_a_number"),
    [
        ({"loss": "dpo"}, Setup(ROOM), 4),
        ({"loss": "dpo", "dtype": "bfloat16"}, Setup(ROOM, 2, "ddp"), 2),
        ({"loss": "rrhf"}, Setup(ROOM), 0),
        ({"loss": "dpo", "use_lora": True}, Setup(ROOM), 0),
        ({"loss": "dpo", "references": "before"}, Setup(ROOM), 0),
        ({"loss": "dpo"}, Setup(ROOM, 8, "fsdp2"), 0),  # training computes all of them before the first update
        ({"loss": "dpo"}, Setup(memory_of("t4")), 0),  # six times 5 GB are more than it has
        ({"loss": "dpo", "references": "ahead"}, Setup(memory_of("t4")), 4),
    ],
)
def test_references_lie_beside_as_a_second_copy(
    more: dict[str, Any], setup: Setup, bytes_a_number: int, monkeypatch: Any
) -> None:
    """1,235,814,400 numbers in Llama 3.2 1B as published."""
    monkeypatch.setattr(on_card, "_trace", lambda *_: {"second, head": Counter(weights=1)})
    found = stretches(config(model="llama-1b", **more), made_up(8, 4, 2, 1), setup)
    assert found["second, head"]["reference"] == bytes_a_number * 1_235_814_400


def test_frozen_weights_have_the_type_they_are_told(monkeypatch: Any) -> None:
    monkeypatch.setitem(SHAPES, "small", {**SHAPES["qwen2.5-0.5b"], "num_hidden_layers": 2})
    sizes = {}
    for dtype in ("auto", "float32", "bfloat16"):
        found = stretches(config(model="small", use_lora=True, dtype=dtype), made_up(8, 4, 2, 1), Setup(ROOM))
        sizes[dtype] = found["second, forward"]["weights"]
    assert sizes["auto"] == sizes["bfloat16"] == pytest.approx(sizes["float32"] / 2, rel=0.02)


def test_checkpointing_takes_less_and_the_ceiling_of_the_gpu_tests_holds() -> None:
    part = made_up(512, 256, 6, 2)
    whole, again = (
        peak(stretches(config(use_lora=True, gradient_checkpointing=on), part, Setup(ROOM))) for on in (0, 1)
    )
    assert 15 * GIB < again < 0.7 * whole
    assert whole < 45 * GIB


def test_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "qwen2.5-0.5b", "--use_cpu", "true", "--use_lora", "true", "--prompt_tokens", "64"]
    assert cli.main(["plan", "--json", "--device", "l4", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["device"] == "l4"
    assert found["peak_memory_bytes"] == sum(found["memory"].values()) < found["room_bytes"] == memory_of("l4")
    # Lists that fill the budget it names take all of the card, and not more than it.
    budget = found["largest_token_budget"]
    some = config(model="qwen2.5-0.5b", use_lora=True)
    each = made_up(64, 256, 4, max(budget // (64 + 4 * 255), 1))
    full = max(map(Counter.total, stretches(some, each, Setup(ROOM), again=True).values()))
    assert 0.85 * memory_of("l4") < full < 1.02 * memory_of("l4")


def test_vllm_beside_takes_its_share(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(on_card, "_trace", lambda *_: {"second, head": Counter(weights=16 * GIB)})
    for share, fits_in in ((0.0, True), (0.3, False)):  # of 22.5 GiB; 16, a twentieth of it and 1 are 17.8
        words = ["--model", "llama-1b", "--use_cpu", "true", "--vllm_share", str(share)]
        assert cli.main(["plan", "--json", "--device", "l4", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["room_bytes"] == int(memory_of("l4") * (1 - share))
        assert found["fits"] is fits_in


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "h99"], "unknown --device 'h99'"),
        (["--device", "h100", "--sharding", "fsdp"], "unknown --sharding 'fsdp'"),
        (["--device", "h100", "--sharding", "fsdp2"], "needs --devices of at least 2"),
        (["--device", "h100", "--offload"], "--offload needs --sharding"),
        (["--device", "h100", "--vllm_share", "1"], "from 0 to below 1"),
        (["--device", "h100", "--candidates", "0"], "at least 1"),
        (["--device", "h100", "--probe"], "need not be here"),
        (
            ["--device", "h100", "--devices", "2", "--sharding", "zero2", "--references", "ahead"],
            "needs whole weights",
        ),
        (["--device", "h100", "--method", "reward"], "knows methods rank and sft"),
        (["--sharding", "fsdp2"], "name it with --device"),
    ],
)
def test_bad_requests_are_one_sentence(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama-8b", "--use_cpu", "true", *more]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_row_of_the_page_is_what_the_command_writes() -> None:
    row = next(line for line in fits.on_page().splitlines() if line.startswith("| llama-8b | LoRA |"))
    assert fits.cell("llama-8b", "LoRA", "1 x 24 GB") == row.split(" | ")[2]


@pytest.mark.slow
def test_the_whole_page_is_what_the_command_writes() -> None:
    assert fits.on_page() == fits.table()


def test_shapes_have_the_published_sizes() -> None:
    """Numbers of weights in millions, from the models' cards."""
    published = {"llama-8b": 8030, "llama-70b": 70554, "qwen2.5-0.5b": 494, "qwen2.5-7b": 7616, "qwen2.5-32b": 32764}
    published |= {"llama-1b": 1236, "llama-3b": 3213, "qwen2.5-1.5b": 1544, "qwen2.5-72b": 72706}
    for name, millions in published.items():
        model = on_card.build(config(model=name).model_settings)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1), name
    assert shape("nothing") is None
