"""Decoding in memory of fixed size writes what a cache that grows writes, whatever leaves, grows or stops."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
import transformers

from rankalign.data.records import CandidateSet
from rankalign.engines import DECODINGS, Policy, SamplingParams, hf, identity, static, uncached
from rankalign.engines.decode import Rows, sample
from rankalign.engines.hf import HFEngine
from rankalign.engines.sampling import uniforms
from rankalign.engines.static import FixedLayer, StaticRows, obstacle, room, rounded
from rankalign.engines.uncached import UncachedRows, rows_of
from rankalign.errors import InputError
from rankalign.models import tiny
from tests.numerics.test_logps import FAMILIES, build

NAMES = (
    *("llama", "qwen2", "qwen2-window", "qwen3", "mistral", "mistral-window", "gemma2", "gemma3", "gemma4", "cohere2"),
    *("gpt2", "gpt_neox", "gptj", "opt", "gpt_oss", "deepseek_v3"),
)
LIMIT = 24
COPIES = 3
GREEDY, DRAWN = {"temperature": 0.0}, {"top_p": 0.95, "min_p": 0.01}


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts(19, 3, 11, 1)  # the windows of these families hold five to seven tokens


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made, and rows are let go of, every few tokens."""
    monkeypatch.setattr(static, "GRAIN", 4)
    monkeypatch.setattr(static, "AHEAD", 5)
    monkeypatch.setattr(static, "FEWEST", 1)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """In float64, where nothing but a mistake differs; Gemma 2's own attention cannot pad in it."""
    return build(name, torch.float32 if name == "gemma2" else dtype).eval()


class Ends:
    """Some tokens, and what stands for a stop string: answers of this family end at every length."""

    def __init__(self, *eos: int) -> None:
        self.eos = frozenset(eos)

    def __call__(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self.eos or (len(ids) > 9 and ids[-1] % 5 == 3)


MANY = Ends(2, 7, 19, 30, 31, 44)


def write(rows: Rows, ends: Callable[[Sequence[int]], bool], limit: int = LIMIT, **settings: Any) -> Any:
    """Answers, and by step the rows that went on and the logits that they saw."""
    count = len(rows.logits)
    rows.select([row for row in range(count) for _ in range(COPIES)])
    numbers = torch.stack([uniforms(1, str(row), "p", 0, limit) for row in range(count * COPIES)])
    seen: list[tuple[list[int], torch.Tensor]] = []
    params = SamplingParams(max_new_tokens=limit, **settings)
    found: Any = ends
    answers = sample(rows, params, numbers, found, lambda alive, logits: seen.append((list(alive), logits.clone())))
    return answers, seen


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding."""
    if expected.dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    else:
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# --- the same answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logits_are_those_of_a_cache_that_grows(name: str, way: dict[str, Any]) -> None:
    model = model_of(name)
    assert obstacle(model, model, graph=False) == ""
    expected, logits = write(Rows(model, PROMPTS), MANY, **way)
    rows = StaticRows(model, PROMPTS, LIMIT, graph=False)
    found, ours = write(rows, MANY, **way)
    assert found == expected
    assert [alive for alive, _ in ours] == [alive for alive, _ in logits]
    for (_, a), (_, b) in zip(ours, logits, strict=True):
        same(a, b)
    assert len({len(ids) for ids, _ in found}) > 1, "all answers are of one length, and nothing ever left"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_in_float32_too(name: str) -> None:
    model = model_of(name, torch.float32)
    expected, logits = write(Rows(model, PROMPTS), MANY)
    found, ours = write(StaticRows(model, PROMPTS, LIMIT, graph=False), MANY)
    assert found == expected
    for (_, a), (_, b) in zip(ours, logits, strict=True):
        same(a, b)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_rows_are_kept_repeated_and_reordered_at_any_step(name: str) -> None:
    model = model_of(name)
    grown, fixed = Rows(model, PROMPTS), StaticRows(model, PROMPTS, 20, graph=False)
    generator = torch.Generator().manual_seed(3)
    for step, rows in enumerate([[2, 0, 0, 3], [0, 1, 2, 3], [3, 1, 2], [0, 2], [1, 1, 0], [0, 1, 2], [2], [0, 0]]):
        for state in (grown, fixed):
            state.select(rows)
        same(fixed.logits, grown.logits)
        tokens = torch.randint(3, 61, (len(rows),), generator=generator)
        for state in (grown, fixed):
            state.append(tokens)
        same(fixed.logits, grown.logits)
        assert len(fixed.logits) == len(rows), f"step {step}"


def test_a_row_that_has_ended_goes_no_further() -> None:
    """Its positions would leave the model's own while shorter texts go on."""
    model, limit = model_of("gpt2"), 40
    both = prompts(60, 4)  # of 64 positions

    def write_on(rows: Rows) -> torch.Tensor:
        rows.select([0, 1, 1])
        rows.append(torch.tensor([5, 6, 7]))
        rows.select([1, 2])
        for step in range(limit - 1):
            rows.append(torch.tensor([step % 50 + 3, 9]))
        return rows.logits

    same(write_on(StaticRows(model, both, limit, graph=False)), write_on(Rows(model, both)))


def test_logits_that_are_no_numbers_are_refused_unless_nobody_reads_them() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    for last, fine in ((7, True), (50, False)):
        rows = StaticRows(model, [[9, 4], [8], [5, 5, 6]], 9, graph=False)
        rows.append(torch.tensor([5, 6, 7]))
        rows.select([0, 2])
        held = rows._held
        assert held is not None
        assert len(held.ids) == 3
        with torch.inference_mode():
            held.ids[1] = 50  # the row that was left out
        if fine:
            rows.append(torch.tensor([8, last]))
            assert bool(rows.logits.isfinite().all())
        else:
            with pytest.raises(InputError, match="not finite"):
                rows.append(torch.tensor([8, last]))


def test_under_autocast_it_computes_in_16_bits_as_the_other_does() -> None:
    model = model_of("llama", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grown, fixed = Rows(model, PROMPTS), StaticRows(model, PROMPTS, 9, graph=False)
        for token in range(5, 10):
            for state in (grown, fixed):
                state.append(torch.full((4,), token))
            assert fixed.logits.dtype == grown.logits.dtype
            torch.testing.assert_close(fixed.logits, grown.logits, rtol=0.05, atol=0.05)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grain", "ahead"), [(64, 128), (4, 5)])
def test_room_is_enough_never_too_much_and_of_few_sizes(
    grain: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "GRAIN", grain)
    monkeypatch.setattr(static, "AHEAD", ahead)
    for prompt, limit in ((1, 1), (1, 2048), (700, 3), (2047, 1), (500, 5000)):
        most, sizes, need = prompt + limit, [], prompt + 1
        while need <= most:
            sizes.append(room(need, most))
            assert sizes[-1] >= need
            assert sizes[-1] % grain == 0
            need = sizes[-1] + 1
        assert sizes[-1] == rounded(most) < most + grain
        assert len(sizes) <= 2 + 12 * (limit > 100)


def held_bytes(rows: StaticRows) -> int:
    assert rows._held is not None
    parts = [part for layer in rows._held.cache.layers for part in (layer.keys, layer.values)]
    return sum(part.untyped_storage().nbytes() for part in parts)


def test_what_is_held_is_what_the_batch_was_made_for() -> None:
    model = model_of("llama", torch.float32)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    rows, sizes = StaticRows(model, PROMPTS, LIMIT, graph=False), []
    for token_id in range(LIMIT - 1):
        rows.append(torch.full((4,), 3 + token_id))
        assert rows._held is not None
        assert all(type(layer) is FixedLayer for layer in rows._held.cache.layers)
        sizes.append(held_bytes(rows))
    assert sizes[-1] == 4 * rounded(19 + LIMIT) * token
    assert sizes == sorted(sizes)
    assert 1 < len(set(sizes)) < 5
    rows.select([1, 2])
    assert held_bytes(rows) == sizes[-1] // 2


def test_a_small_batch_keeps_its_size_and_a_large_one_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "FEWEST", 4)
    model = model_of("llama")

    def sizes(copies: int) -> list[int]:
        rows, found = StaticRows(model, PROMPTS, LIMIT, graph=False), []
        rows.select([row for row in range(4) for _ in range(copies)])
        while len(rows.logits) > 1:
            rows.append(torch.full((len(rows.logits),), 5))
            assert rows._held is not None
            found.append(len(rows._held.ids))
            rows.select(range(len(rows.logits) - 1))
        return found

    assert sizes(1) == [4, 4, 4]
    assert sizes(3) == [12] * 6 + [6] * 3 + [3] * 2


def test_rows_are_let_go_of_at_once_when_nobody_holds_them() -> None:
    """A graph keeps memory: none may wait for the collector of cycles."""
    rows = StaticRows(model_of("llama"), PROMPTS, 9, graph=False)
    rows.append(torch.tensor([5, 6, 7, 8]))
    assert rows._held is not None
    seen = [weakref.ref(rows), weakref.ref(rows._held.cache)]
    gc.disable()
    try:
        del rows
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_batches_count_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "GRAIN", 64)
    monkeypatch.setattr(hf, "MAX_TOKENS", 1280)
    some: Any = [None] * 40
    sizes = {}
    for decoding in DECODINGS:
        made = HFEngine(Policy("p", model="tiny", decoding=decoding, sampling=SamplingParams(max_new_tokens=30)))
        monkeypatch.setattr(made, "_lengths", lambda prompts: [70] * len(prompts))
        sizes[decoding] = len(made.batches(some)[0])
    assert sizes == {"auto": 12, "dynamic": 12, "static": 10, "graph": 10}


# --- the engine ---------------------------------------------------------------------------------------------------

TEXTS = [CandidateSet(f"p{i}", "the quick brown fox jumps over the lazy dog again"[: 5 + 11 * i]) for i in range(4)]


def engine(decoding: str, model: Any = None, share: float = 0.0, **settings: Any) -> HFEngine:
    policy = Policy("p", model="tiny", decoding=decoding, start_share=share, sampling=SamplingParams(**settings))
    made = HFEngine(policy)
    made.model, made.tokenizer = model or tiny.build_model().double(), tiny.build_tokenizer()
    return made


@pytest.mark.parametrize(
    "settings",
    [{"n": 3, "logprobs": 4}, {"n": 2, "stop": ("e", "q")}, {"temperature": 0.0}, {"n": 3, "top_k": 9, "seed": 5}],
    ids=["log-probs", "stop strings", "greedy", "top-k"],
)
def test_answers_are_those_of_a_cache_that_grows(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[type] = []
    monkeypatch.setattr(uncached, "StaticRows", lambda *args: made.append(StaticRows) or StaticRows(*args))
    model = tiny.build_model().double()
    answers = {
        decoding: engine(decoding, model, max_new_tokens=20, **settings).generate(TEXTS) for decoding in DECODINGS[:3]
    }
    assert len(made) == 1  # `auto` on a CPU is what it was
    plain = [[replace(response, meta={}) for response in row] for row in answers["static"]]
    assert plain == [[replace(response, meta={}) for response in row] for row in answers["dynamic"]]
    assert answers["auto"] == answers["dynamic"]
    for ours, theirs in zip(*(chain(*answers[name]) for name in ("static", "dynamic")), strict=True):
        for a, b in zip(ours.meta.get("logprobs", ()), theirs.meta.get("logprobs", ()), strict=True):
            assert a["top"] == pytest.approx(b["top"], abs=1e-9)


def test_a_stream_and_a_mixture_are_too() -> None:
    model, other = tiny.build_model().double(), tiny.build_model().double()
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=weight.dtype)
    for share in (0.0, 0.4):
        told = []
        for decoding in ("dynamic", "static"):
            made = engine(decoding, model, share, max_new_tokens=20)
            made.start = lambda _: nullcontext(other)
            told.append([response.text for response in made.stream(TEXTS[2])])
        assert told[0] == told[1]
        assert len(told[0]) > 3


# --- who cannot ---------------------------------------------------------------------------------------------------

HYBRID = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1,
}  # fmt: skip
GPT_NEO = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "window_size": 4}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Bamba", HYBRID, "layers of another kind"),
        ("GPTNeo", GPT_NEO, "runs GPTNeoForCausalLM with no static cache"),
    ],
)
def test_a_model_that_cannot_goes_on_and_the_reason_is_said_once(
    kind: str, settings: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for decoding in ("auto", "dynamic"):
        assert not isinstance(rows_of(model, PROMPTS, 4, decoding), StaticRows)
    assert "decoding:" not in capsys.readouterr().err
    for _ in range(2):
        assert not isinstance(rows_of(model, PROMPTS, 4, "static"), StaticRows)
    assert [line for line in capsys.readouterr().err.splitlines() if "decoding:" in line and reason in line] == [
        f"decoding: static is not for {kind}ForCausalLM here: {obstacle(model, model, False)}; dynamic"
    ]


def test_attention_that_takes_no_such_mask_is_named() -> None:
    model = model_of("llama")
    model.config._attn_implementation = "flex_attention"
    assert obstacle(model, model, False) == "attention 'flex_attention' takes no mask for it"


def test_a_graph_needs_a_gpu_and_a_search_memory_that_is_reordered(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")
    assert type(rows_of(model, PROMPTS, 40, "graph")) is Rows
    assert "a CUDA graph needs a GPU" in capsys.readouterr().err
    expected, found = (
        engine(decoding, n=2, num_beams=2, max_new_tokens=6).generate(TEXTS) for decoding in ("dynamic", "static")
    )
    assert found == expected
    assert "a beam search reorders its rows at every token" in capsys.readouterr().err


def test_a_model_without_a_memory_that_serves_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**FAMILIES["llama"][1], rope_parameters=scaled)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(rows_of(model, PROMPTS, 60, "static"), UncachedRows)
    assert "turn their positions by it" in capsys.readouterr().err


def test_a_model_that_gives_other_logits_so_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    plain = FixedLayer.update

    def wrong(self: FixedLayer, *args: Any) -> Any:
        keys, values = plain(self, *args)
        return keys, values.flip(-1)

    monkeypatch.setattr(FixedLayer, "update", wrong)
    assert obstacle(model, model, False) == "it gives other logits so"
    monkeypatch.undo()
    assert obstacle(model, model, False) == "it gives other logits so"  # tried once, and kept with the model
    assert obstacle(model_of("llama"), model_of("llama"), False) == ""


def test_a_model_that_cannot_run_so_is_found_out() -> None:
    model = model_of("llama")
    inside, plain = model.model, model.model.forward

    def by_length(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs["past_key_values"].get_seq_length(), int):
            raise TypeError("a number of tokens, please")
        return plain(*args, **kwargs)

    inside.forward = by_length
    assert obstacle(model, model, False) == "TypeError: a number of tokens, please"


# --- the setting --------------------------------------------------------------------------------------------------


def test_the_setting_is_checked_and_counts_where_it_is_set() -> None:
    with pytest.raises(InputError, match="decoding must be one of auto, dynamic, static, graph"):
        Policy("p", decoding="compiled")
    with pytest.raises(InputError, match="decoding is a setting of engine 'hf'"):
        Policy("p", engine="vllm", decoding="static")
    assert "decoding" not in json.dumps(identity(Policy("p")))
    assert identity(Policy("p", decoding="static"))["decoding"] == "static"
