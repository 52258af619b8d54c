"""Answers written by CUDA graphs: those of the CPU, with one wait and few launches a token."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rankalign.data.records import CandidateSet
from rankalign.engines import Policy, SamplingParams, static, uncached
from rankalign.engines import sampling as draws
from rankalign.engines.decode import Rows, sample
from rankalign.engines.graphs import Replayed, waits
from rankalign.engines.hf import HFEngine
from rankalign.engines.static import WORTH, StaticRows, obstacle
from rankalign.engines.uncached import rows_of
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models.adapters import add_lora
from rankalign.recipes.rollouts import PolicySampler
from tests.gpu.models import build
from tests.gpu.test_decoding import NAMES, PROMPTS, WAYS, Ends

DRAWN = [way for way in WAYS if "num_beams" not in WAYS[way]]
LIMIT = 20


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made, and rows are let go of, every few tokens."""
    monkeypatch.setattr(static, "GRAIN", 8)
    monkeypatch.setattr(static, "AHEAD", 5)
    monkeypatch.setattr(static, "FEWEST", 1)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """What was captured, in turn."""
    found: list[Replayed] = []
    plain = Replayed._capture

    def capture(self: Replayed, function: Callable[[], None]) -> None:
        found.append(self)
        plain(self, function)

    monkeypatch.setattr(Replayed, "_capture", capture)
    return found


def write(rows: Rows, way: str, limit: int, ends: Callable[[Sequence[int]], bool]) -> Any:
    rows.select([0, 0, 1, 1, 2, 2])
    numbers = torch.stack([draws.uniforms(1, str(row), "p", 0, limit) for row in range(6)])
    told: Any = ends
    return sample(rows, SamplingParams(max_new_tokens=limit, **WAYS[way]), numbers, told)


@pytest.mark.parametrize("way", DRAWN)
@pytest.mark.parametrize("name", [*NAMES, "qwen2-window", "gemma3", "gpt_neox"])
def test_answers_are_those_of_the_cpu(name: str, way: str, captures: list[Replayed]) -> None:
    """In float64, where no border between two tokens is near; Gemma 2's own attention cannot pad in it."""
    model = build(name, torch.float32 if name == "gemma2" else torch.float64).eval()
    expected = write(Rows(model, PROMPTS), way, LIMIT, Ends())
    model = model.to("cuda")
    assert obstacle(model, model, graph=True) == ""
    captures.clear()
    assert write(StaticRows(model, PROMPTS, LIMIT, graph=True), way, LIMIT, Ends()) == expected
    assert captures
    assert not any(one.refused for one in captures)


def test_a_graph_is_made_once_for_a_size_and_replayed_at_every_other_token(captures: list[Replayed]) -> None:
    """The first token of each size goes without; another batch, of longer prompts, makes its own."""
    model = build("llama", torch.float32).to("cuda").eval()
    for prompts in (PROMPTS, [[*range(3, 30)], *PROMPTS[:2]]):
        captures.clear()
        rows, sizes, runs = StaticRows(model, prompts, LIMIT, graph=True), [], 0
        for step in range(LIMIT - 1):
            if step in (14, 16):
                rows.select(range(len(rows.logits) - 1))
            rows.append(torch.full((len(rows.logits),), 5, device="cuda"))
            held = rows._held
            assert held is not None
            assert rows.replayed is not None
            sizes.append(tuple(held.mask.shape))
            runs += rows.replayed._graph is not None
        assert [size[0] for size in sizes] == [3] * 16 + [1] * 3
        assert len(captures) == len(set(map(id, captures))) == len(set(sizes)) >= 2
        assert runs == len(sizes) - len(set(sizes))


@pytest.mark.parametrize("way", DRAWN)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_waits_once_and_launches_one_graph(
    name: str, way: str, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing goes up to the device; what is launched beside is drawing, as much for any model."""
    monkeypatch.setattr(static, "AHEAD", 64)  # one size, with room for all tokens
    model = build(name, torch.float32).to("cuda").eval()
    logs = []
    for limit in (12, 16):
        rows = StaticRows(model, PROMPTS, 20, graph=True)
        with watch() as log:
            write(rows, way, limit, lambda ids: False)
        logs.append(log)
    assert len(logs[1].waits) - len(logs[0].waits) == 4
    assert len(logs[1].uploads) == len(logs[0].uploads)
    replays = logs[1].replays - logs[0].replays
    beside = (len(logs[1].kernels) - len(logs[0].kernels)) / 4
    assert replays == 4
    assert beside == {"sampling": 9, "greedy": 5, "nucleus": 30, "top_k and min_p": 23}[way]


def test_what_is_captured_neither_waits_nor_copies_from_the_host(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[Any] = []
    plain = Replayed._capture

    def capture(self: Replayed, function: Callable[[], None]) -> None:
        with watch() as log:
            plain(self, function)
        logs.append(log)

    monkeypatch.setattr(Replayed, "_capture", capture)
    for name in NAMES:
        model = build(name, torch.float32).to("cuda").eval()
        write(StaticRows(model, PROMPTS, LIMIT, graph=True), "sampling", LIMIT, Ends())
    assert len(logs) >= len(NAMES)
    assert all(log.kernels and not log.waits and not log.uploads for log in logs)


# --- one thing again and again ------------------------------------------------------------------------------------


def test_what_is_replayed_is_done_as_often_as_it_was_asked_for() -> None:
    total, step = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    replayed, seen = Replayed(), []

    def add() -> None:
        seen.append(1)
        total.add_(step * 2)

    for count in range(1, 7):
        step.fill_(count)  # read where it lies, whenever it is read
        replayed(add)
        assert total.tolist() == [count * (count + 1)] * 3
    assert len(seen) == 2
    assert replayed.refused == ""


def test_what_waits_is_not_captured_but_run() -> None:
    total = torch.zeros((), device="cuda")
    replayed = Replayed()

    def wait() -> None:
        total.add_(float(total) * 0 + 1)

    for count in range(1, 5):
        replayed(wait)
        assert float(total) == count
    assert replayed.refused == "it waits for the device"


def test_what_cannot_be_captured_is_run_and_the_device_goes_on() -> None:
    total, seen = torch.zeros((), device="cuda"), []
    replayed = Replayed()

    def late() -> None:
        """Waits from its second run on."""
        seen.append(float(total) if seen else 0.0)
        total.add_(1)

    for count in range(1, 5):
        replayed(late)
        assert float(total) == count
    assert replayed.refused.startswith("it cannot be captured: ")
    again = Replayed()

    def add() -> None:
        total.add_(1)

    for count in range(5, 9):
        again(add)
        assert float(total) == count
    assert again.refused == ""


def test_waits_are_those_of_this_thread_and_the_mode_is_put_back() -> None:
    number = torch.ones((), device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    with waits() as found:
        number.add_(1)
        assert found == []
        float(number)
        torch.ones(4).to("cuda")
    assert len(found) == 2
    assert torch.cuda.get_sync_debug_mode() == before


def test_rows_and_their_graph_are_let_go_of_at_once() -> None:
    model = build("llama", torch.float32).to("cuda").eval()
    rows = StaticRows(model, PROMPTS, LIMIT, graph=True)
    for _ in range(3):
        rows.append(torch.tensor([5, 6, 7], device="cuda"))
    assert rows.replayed is not None
    assert rows.replayed._graph is not None
    assert rows._held is not None
    seen = [weakref.ref(rows), weakref.ref(rows.replayed), weakref.ref(rows._held.cache)]
    gc.disable()
    try:
        del rows
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


# --- who asks -----------------------------------------------------------------------------------------------------


def test_graphs_are_taken_unasked_where_they_are_worth_it() -> None:
    model = build("llama", torch.float32).to("cuda").eval()
    assert type(rows_of(model, PROMPTS, WORTH)) is StaticRows
    assert rows_of(model, PROMPTS, WORTH)._graph  # type: ignore[attr-defined]
    assert type(rows_of(model, PROMPTS, WORTH - 1)) is Rows
    assert type(rows_of(model, PROMPTS, WORTH, "dynamic")) is Rows
    assert type(rows_of(model, PROMPTS, WORTH - 1, "graph")) is StaticRows
    assert not rows_of(model, PROMPTS, WORTH, "static")._graph  # type: ignore[attr-defined]


def test_a_model_that_waits_at_every_token_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = build("llama", torch.float64).to("cuda").eval()
    expected = write(Rows(model, PROMPTS), "sampling", LIMIT, Ends())
    model.model.layers[0].register_forward_hook(lambda layer, args, out: out * float(args[0].sum() * 0 + 1))
    for decoding, said in (("auto", False), ("graph", True), ("graph", False)):
        rows = rows_of(model, PROMPTS, LIMIT, decoding)
        assert type(rows) is Rows
        assert ("it waits for the device" in capsys.readouterr().err) == said
        assert write(rows, "sampling", LIMIT, Ends()) == expected


def test_logits_that_are_no_numbers_are_refused() -> None:
    model: Any = build("llama", torch.float32).to("cuda").eval()
    assert obstacle(model, model, graph=True) == ""
    rows = StaticRows(model, PROMPTS, LIMIT, graph=True)
    for step in range(6):
        rows.append(torch.tensor([5, 6, 7], device="cuda"))
        if step == 3:
            rows.told(torch.zeros(1, device="cuda"))
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)  # read where it lies
    with pytest.raises(InputError, match="not finite"):
        rows.told(torch.zeros(1, device="cuda"))


def test_rollouts_are_replayed(captures: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = PolicySampler(models.load_tokenizer("tiny"), SamplingParams(max_new_tokens=WORTH, seed=1))
    policy = models.load_policy("tiny", dtype="float32").double()
    keys = [(str(i), i) for i in range(3)]
    found = sampler(policy, PROMPTS, keys)
    assert captures
    assert not any(one.refused for one in captures)
    monkeypatch.setattr(uncached, "WORTH", 1000)
    captures.clear()
    assert sampler(policy, PROMPTS, keys) == found
    assert not captures
    assert max(len(answer.ids) for answer in found) > 4


def test_weights_are_cast_anew_under_autocast(captures: list[Replayed]) -> None:
    """Casts that autocast kept would be gone when its context ends, and weights may have changed since."""
    model: Any = build("llama", torch.float32).to("cuda").eval()
    grown, fixed = Rows(model, PROMPTS), StaticRows(model, PROMPTS, LIMIT, graph=True)
    for step in range(8):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            for rows in (grown, fixed):
                rows.append(torch.tensor([5, 6, 7], device="cuda"))
        torch.testing.assert_close(fixed.logits.float(), grown.logits.float(), rtol=0.05, atol=0.1)
        if step == 4:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(-3)
    assert len(captures) == 1
    assert not any(one.refused for one in captures)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_engine_with_an_adapter_and_its_start_model(share: float, captures: list[Replayed]) -> None:
    prompts = [CandidateSet(f"p{i}", "the quick brown fox"[: 4 + 5 * i]) for i in range(3)]
    tokenizer = models.load_tokenizer("tiny")
    adapted = _adapted()
    told = {}
    for decoding in ("dynamic", "graph"):
        sampling = SamplingParams(n=2, max_new_tokens=LIMIT)
        engine = HFEngine(Policy("p", model="tiny", decoding=decoding, start_share=share, sampling=sampling))
        engine.take(adapted, tokenizer, "tiny", object())
        engine.start = _without_adapter
        captures.clear()
        told[decoding] = engine.generate(prompts)
        assert bool(captures) == (decoding == "graph")
    assert told["graph"] == told["dynamic"]


def _adapted() -> Any:
    model = add_lora(models.load_policy("tiny", dtype="float32"), r=2, alpha=4, dropout=0.0).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


class _without_adapter:
    def __init__(self, model: Any) -> None:
        self.model, self.off = model, model.disable_adapter()

    def __enter__(self) -> Any:
        self.off.__enter__()
        return self.model

    def __exit__(self, *about: Any) -> None:
        self.off.__exit__(*about)
