"""What engine ``vllm`` says to vLLM, noted by a stand-in for it; vLLM itself runs in ``tests/vllm``."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rankalign.config import build
from rankalign.data.records import CandidateSet
from rankalign.engines import ENGINES, Policy
from rankalign.engines.settings import policy_settings
from rankalign.errors import InputError

BIG: dict[str, Any] = {
    "tensor_parallel_size": 8,
    "gpu_memory_utilization": 0.85,
    "max_model_len": 4096,
    "quantization": "fp8",
    "kv_cache_dtype": "fp8",
    "engine_args": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


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
            self.llm_engine = SimpleNamespace(model_config=config, engine_core=SimpleNamespace(shutdown=lambda: None))

        def generate(self, prompts: Any, params: Any, **_: Any) -> list[Any]:
            answer = SimpleNamespace(token_ids=[40, 41], finish_reason="stop", stop_reason=None)
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": lambda **told: told},
        "vllm.version": {},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": None},
        "vllm.distributed": {"cleanup_dist_env_and_memory": lambda: None},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
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
