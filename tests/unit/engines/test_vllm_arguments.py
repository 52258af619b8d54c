"""What engine ``vllm`` says to vLLM, noted by a stand-in for it; vLLM itself runs in ``tests/vllm``."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rankalign.config import build
from rankalign.data.records import CandidateSet
from rankalign.engines import ENGINES, Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError
from rankalign.models import adapters, tiny

BIG: dict[str, Any] = {
    "tensor_parallel_size": 8,
    "gpu_memory_utilization": 0.85,
    "max_model_len": 4096,
    "quantization": "fp8",
    "kv_cache_dtype": "fp8",
    "engine_args": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


CALLS: list[Any] = []
"""What was asked of the stand-in, in order."""


@dataclasses.dataclass
class EngineArgs:
    """Some of vLLM's own."""

    model: str = ""
    dtype: str = "auto"
    enable_lora: bool = False
    pipeline_parallel_size: int = 1
    enforce_eager: bool = False
    swap_space: float = 4
    tensor_parallel_size: int = 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each ``vllm.LLM`` that was made."""
    made: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, model: str, **arguments: Any) -> None:
            made.append(arguments)
            config = SimpleNamespace(
                max_model_len=arguments["max_model_len"] if arguments["max_model_len"] > 0 else 512
            )
            self.llm_engine = SimpleNamespace(
                model_config=config,
                engine_core=SimpleNamespace(shutdown=lambda: None),
                add_lora=lambda one: CALLS.append(("add", one)),
                remove_lora=lambda number: CALLS.append(("remove", number)),
            )

        def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
            CALLS.append((method, sorted(p.name for p in Path(kwargs["weights_path"]).glob("*.safetensors"))))

        def reset_prefix_cache(self) -> None:
            CALLS.append(("forget",))

        def sleep(self, level: int) -> None:
            CALLS.append(("sleep", level))

        def wake_up(self, tags: list[str]) -> None:
            CALLS.append(("wake", *tags))

        def generate(self, prompts: Any, params: Any, lora_request: Any = None, **_: Any) -> list[Any]:
            CALLS.append(("answer", lora_request) if lora_request else ("answer",))
            answer = SimpleNamespace(token_ids=[40, 41], finish_reason="stop", stop_reason=None)
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": lambda **told: told},
        "vllm.version": {},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda name, number, path: (name, number)},
        "vllm.distributed": {"cleanup_dist_env_and_memory": lambda: None},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()
    yield made
    gc.collect()  # models go while the stand-in is there


def answer(**settings: Any) -> Any:
    engine = ENGINES.load("vllm")(build(Policy, {"name": "me", "engine": "vllm", "model": "tiny", **settings}, "test"))
    engine.generate([CandidateSet("a", "hello")])
    return engine


def test_settings_reach_vllm_under_its_names(loads: list[dict[str, Any]]) -> None:
    engine = answer(**BIG)
    told = {**{name: value for name, value in BIG.items() if name != "engine_args"}, **BIG["engine_args"]}
    assert {name: loads[0][name] for name in told} == told
    again = answer(**BIG, seed=3)  # one load serves both policies, and another one where an argument differs
    assert len(loads) == 1
    other = answer(tensor_parallel_size=2)
    assert len(loads) == 2
    assert loads[1]["tensor_parallel_size"] == 2
    assert loads[1]["max_model_len"] == -1
    assert not {"quantization", "kv_cache_dtype", "gpu_memory_utilization"} & loads[1].keys()
    del engine, again, other


def test_max_model_len_refuses_what_is_longer(loads: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="exceeds the model's context of 20"):
        answer(max_model_len=20, max_new_tokens=18)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"engine_args": {"swap_spaces": 1}},
            r"engine_args: vllm has no 'swap_spaces' \(did you mean 'swap_space'\?\)",
        ),
        ({"engine_args": {"dtype": "half"}}, "engine_args: dtype is the policy's dtype"),
        ({"engine_args": {"tensor_parallel_size": 2}}, "engine_args: tensor_parallel_size is a setting of its own"),
        ({"engine_args": {"trust_remote_code": True}}, "engine_args: trust_remote_code is off"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must lie between 0 and 1"),
        ({"max_model_len": -1}, "max_model_len must not be negative"),
        ({"device_map": "auto"}, "device_map is a setting of engine 'hf'"),
        ({"engine": "hf", "quantization": "fp8"}, "quantization is a setting of engine 'vllm'"),
        ({"tensor_parallel": 2}, "unknown key 'tensor_parallel' .did you mean"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], reason: str, loads: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=reason):
        answer(**settings)
    assert not loads


def test_identity_holds_what_changes_numbers() -> None:
    """Nothing of it where nothing is set: outputs of 0.1 stay finished."""
    plain = policy_settings(Policy("me", "vllm", "tiny"))
    assert not set(plain) & {*BIG, "device_map"}
    big = policy_settings(Policy("me", "vllm", "tiny", **BIG))
    about = {"tensor_parallel_size", "quantization", "kv_cache_dtype", "engine_args"}
    assert set(big) - set(plain) == about
    assert {name: big[name] for name in about} == {name: BIG[name] for name in about}


# --- weights that train ---------------------------------------------------------------------------------------------


def following(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    if gpu:
        monkeypatch.setattr("rankalign.models.load.device", lambda: torch.device("cuda"))
    return ENGINES.load("vllm")(build(Policy, {"name": "me", "engine": "vllm", "dtype": "float32"}, "test"))


def answered(engine: Any, model: Any, version: int) -> list[Any]:
    """What is asked of vLLM for one batch by the weights of a model."""
    CALLS.clear()
    engine.take(model, tiny.build_tokenizer(), "tiny", version)
    engine.generate([CandidateSet("a", "hello")])
    engine.rest()
    return list(CALLS)


def test_weights_come_in_once_a_version(loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = following(False, monkeypatch), tiny.build_model()
    reload = [("reload_weights", ["model.safetensors"]), ("forget",)]
    assert answered(engine, model, 1) == [*reload, ("answer",)]
    assert answered(engine, model, 1) == [("answer",)]  # another policy with the same weights
    assert answered(engine, model, 2) == [*reload, ("answer",)]
    assert len(loads) == 1
    assert "enable_sleep_mode" not in loads[0]  # a CPU has nothing to give back


def test_an_adapter_takes_the_place_of_the_last(loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = following(False, monkeypatch), adapters.add_lora(tiny.build_model(), 4, 8, 0.0)
    one, two = (f"adapter-{n}" for n in (1, 2))
    assert answered(engine, model, 1) == [("add", (one, 1)), ("answer", (one, 1))]
    assert answered(engine, model, 2) == [("remove", 1), ("add", (two, 2)), ("answer", (two, 2))]
    assert loads[0]["max_lora_rank"] == 8


@pytest.mark.parametrize("lora", [False, True])
def test_on_a_gpu_it_sleeps_while_the_model_trains(
    lora: bool, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are anew after a sleep that keeps none; an adapter's base waits on the host."""
    engine, model = following(True, monkeypatch), tiny.build_model()
    if lora:
        model = adapters.add_lora(model, 4, 8, 0.0)
    answered(engine, model, 1)
    assert loads[0]["enable_sleep_mode"] is True
    assert CALLS[-1] == ("sleep", 1 if lora else 2)
    calls = answered(engine, model, 1)
    reload = [] if lora else [("reload_weights", ["model.safetensors"]), ("forget",)]
    assert [call for call in calls if call[0] != "answer"] == [
        ("wake", "weights"), *reload, ("wake", "kv_cache"), ("sleep", 1 if lora else 2),
    ]  # fmt: skip


def test_a_policy_that_stays_what_it_is_shares_nothing(
    loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = following(False, monkeypatch)
    answered(engine, tiny.build_model(), 1)
    fixed = answer(dtype="float32")
    assert len(loads) == 2
    CALLS.clear()
    engine.generate([CandidateSet("a", "hello")])  # the other made room; its weights have to come anew
    assert ("forget",) in CALLS
    del fixed
