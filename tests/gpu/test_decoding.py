"""Answers written on a GPU: those of the CPU, with one wait a token."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rankalign.commands import sample as sample_command
from rankalign.engines import Policy, SamplingParams
from rankalign.engines import sampling as draws
from rankalign.engines.beams import search
from rankalign.engines.decode import Rows, sample
from rankalign.engines.hf import MAX_ROWS_ON_GPU, HFEngine
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import quant
from rankalign.recipes.rollouts import PolicySampler
from tests.gpu.models import EXPERTS, build

PROMPTS = [[5, 6, 7, 11], [8, 9], [4]]
WAYS: dict[str, dict[str, Any]] = {
    "sampling": {},
    "greedy": {"temperature": 0.0},
    "nucleus": {"top_p": 0.8},
    "top_k and min_p": {"top_k": 9, "min_p": 0.02, "top_p": 0.9},
    "beams": {"num_beams": 4, "n": 4},
    "diverse beams": {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0, "n": 4},
    "diverse groups": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.3, "n": 6},
}
NAMES = ("llama", "mistral-window", "gemma2", "gpt2", "opt", "qwen3")


class Ends:
    """An end of sequence, or what stands for a stop string."""

    eos = frozenset((2, 30, 31))

    def __call__(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self.eos or (len(ids) > 6 and ids[-1] % 7 == 3)


def write(model: nn.Module, way: str, limit: int, ends: Callable[[Sequence[int]], bool]) -> Any:
    params = SamplingParams(max_new_tokens=limit, **WAYS[way])
    rows = Rows(model, PROMPTS)
    if params.num_beams > 1:
        found = search(rows, params, ends, 3)
        return [[(h.ids, h.ended) for h in answers] for answers in found]
    rows.select([0, 0, 1, 1, 2, 2])
    numbers = torch.stack([draws.uniforms(1, str(row), "p", 0, limit) for row in range(6)])
    return sample(rows, params, numbers, ends)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*NAMES, *EXPERTS])
def test_answers_are_those_of_the_cpu(name: str, way: str) -> None:
    """In float64, where no border between two tokens is near; Gemma 2's own attention cannot pad in it."""
    model = build(name, torch.float32 if name == "gemma2" else torch.float64).eval()
    expected = write(model, way, 12, Ends())
    assert write(model.to("cuda"), way, 12, Ends()) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_waits_once(name: str, way: str, watch: Any) -> None:
    """For all rows, groups and beams; and where all rows of a sample go on, nothing goes up."""
    model = build(name, torch.float32).to("cuda").eval()
    write(model, way, 2, lambda ids: False)
    logs = []
    for limit in (4, 8):
        with watch() as log:
            write(model, way, limit, lambda ids: False)
        logs.append(log)
    assert len(logs[1].waits) - len(logs[0].waits) == 4
    if "beams" not in way and "groups" not in way:
        assert len(logs[1].uploads) == len(logs[0].uploads)


def test_a_nucleus_wider_than_what_is_sorted_is_sorted_whole(monkeypatch: pytest.MonkeyPatch, watch: Any) -> None:
    model = build("llama").eval()
    expected = write(model, "nucleus", 8, Ends())
    monkeypatch.setattr(draws, "NUCLEUS", 2)
    model = model.to("cuda")
    assert write(model, "nucleus", 8, Ends()) == expected


def test_logits_that_are_no_numbers_are_refused() -> None:
    model: Any = build("llama", torch.float32).to("cuda").eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        write(model, "sampling", 4, Ends())
    with pytest.raises(InputError, match="not finite"):
        write(model, "diverse beams", 4, Ends())


def test_rollouts_wait_once_a_token_and_multiply_in_16_bits_under_autocast(watch: Any) -> None:
    sampler = PolicySampler(models.load_tokenizer("tiny"), SamplingParams(max_new_tokens=6, seed=1))
    policy = models.load_policy("tiny", dtype="float32")
    keys = [(str(i), i) for i in range(3)]
    sampler(policy, PROMPTS, keys)
    with watch() as log, torch.autocast("cuda", dtype=torch.bfloat16):
        answers = sampler(policy, PROMPTS, keys)
    assert len(log.waits) <= max(len(answer.ids) for answer in answers) + 2  # two for the prompts, once
    products = {kind for name, kind, _ in log.kernels if name.startswith(("aten::mm", "aten::addmm"))}
    assert products == {"bfloat16"}


def test_batches_are_as_large_as_the_memory_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HFEngine(Policy("p", model="tiny", sampling=SamplingParams(n=1, max_new_tokens=8)))
    monkeypatch.setattr(engine, "_lengths", lambda prompts: [100] * len(prompts))
    prompts: Any = [None] * 2000
    assert max(map(len, engine.batches(prompts))) == MAX_ROWS_ON_GPU
    config = models.load_policy("tiny").config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**31 + token * 50_000))
    weights = sum(f.stat().st_size for f in models.local_folder("tiny").glob("*.safetensors"))
    rows, tokens = engine._most()
    assert rows == MAX_ROWS_ON_GPU
    assert tokens == max(32768, int(0.6 * (2**31 + token * 50_000 - weights) / token))


def test_launches_of_eight_bit_weights_are_few(watch: Any) -> None:
    """Widened, rounded and multiplied: three a matrix of up to 64M weights, as all of an 8B model are but its head."""
    layer = nn.Linear(64, 96, bias=False)
    model = nn.Sequential(layer)
    quant.quantize_8bit(model, torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    expected = model(x)
    model = model.to("cuda")
    with watch() as log:
        out = model(x.to("cuda"))
    assert len([1 for name, _, _ in log.kernels if name != "upload"]) == 3
    torch.testing.assert_close(out.cpu(), expected)
    sizes = {"q": (4096, 4096), "k": (1024, 4096), "up": (14336, 4096), "down": (4096, 14336), "head": (128256, 4096)}
    with torch.device("meta"):
        blocks = {name: len(quant._blocks(_on_gpu(torch.empty(size)))) for name, size in sizes.items()}
    assert blocks == {"q": 1, "k": 1, "up": 1, "down": 1, "head": 8}


def _on_gpu(tensor: torch.Tensor) -> Any:
    class There(torch.Tensor):
        is_cuda = True

    return tensor.as_subclass(There)


@pytest.mark.parametrize(
    ("installed", "asked", "engine"), [(True, None, "vllm"), (True, "hf", "hf"), (False, None, "hf")]
)
def test_sample_takes_vllm_where_it_is_installed_and_says_so(
    installed: bool, asked: str | None, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(config=None, model="tiny", engine=asked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert sample_command._one_policy(args)["policies"][0]["engine"] == engine
    assert ("engine: vllm" in capsys.readouterr().err) == (engine == "vllm")
    models.stay_on_cpu(True)
    try:
        assert sample_command._one_policy(args)["policies"][0]["engine"] == "hf"
    finally:
        models.stay_on_cpu(False)
