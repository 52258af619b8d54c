"""Compiled layers: the same numbers, by one graph, whatever the lengths of rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from rankalign.errors import InputError
from rankalign.rows.compiled import compile_layers
from rankalign.rows.logps import list_logps
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.e2e.distributed import log, settings, write_data
from tests.numerics.test_logps import FAMILIES


@pytest.fixture(autouse=True)
def _no_graphs() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def build(name: str) -> Any:
    import transformers

    kind, told = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**told)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_rows_of_many_lengths_run_by_one_graph_to_the_same_numbers(name: str, layout: str) -> None:
    plain = build(name)
    model = copy.deepcopy(plain)
    compile_layers(model, "aot_eager")
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 60, (length,), generator=generator).tolist()

    for step in range(5):
        prompts = [draw(3 + step + i) for i in range(1 + step % 2)]
        answers = [[draw(2 + (7 * n + step) % 9) for n in range(3)] for _ in prompts]
        found, expected = (list_logps(some, prompts, answers, layout=layout) for some in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        found.sum().backward()
        expected.sum().backward()
        with torch.no_grad():
            list_logps(model, prompts, answers, layout=layout)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert graphs() == 1


@pytest.mark.parametrize(
    "more", [{"loss": "dpo", "use_lora": True}, {"method": "reward"}, {"gradient_checkpointing": True}]
)
def test_a_run_compiles_twice_at_most(more: dict[str, Any], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    fixed = {"save_strategy": "no", "max_steps": 4, "use_cpu": True, "eval_data": str(data), **more}
    fixed |= {"eval_strategy": "steps", "eval_steps": 2}
    runs = {}
    for name, flags in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        config = parse_settings(settings(data, tmp_path / name, **fixed, **flags))
        assert ("torch_compile" in config.own_settings()) is bool(flags)
        train(config)
        runs[name] = [line["loss"] for line in log(tmp_path / name)]
    assert runs["compiled"] == pytest.approx(runs["plain"], rel=1e-5)
    assert 1 <= graphs() <= 2


def test_what_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="opt models have no module `mlp`"):
        compile_layers(build("opt"))
    with pytest.raises(InputError, match="graphs of one length"):
        compile_layers(build("llama"), mode="reduce-overhead")
    told = {"model": "tiny", "data": "x.jsonl", "output_dir": str(tmp_path), "torch_compile": True}
    with pytest.raises(InputError, match="--torch_compile works with"):
        parse_settings({**told, "use_lora": True, "load_in_4bit": True})
    with pytest.raises(InputError, match="--method ppo does not read --torch_compile"):
        parse_settings({**told, "method": "ppo", "reward": "tiny-rm"})
