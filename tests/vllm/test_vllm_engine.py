"""Engine ``vllm`` for real, with the default model, beside engine ``hf``; run by ``make test-vllm``."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="vllm is not installed here; make test-vllm has an environment of its own")

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.engines.vllm import VLLMEngine
from rankalign.errors import InputError
from rankalign.models import load as models

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Is ice cold?"}],
    "Explain in two sentences why leaves are green, and why many of them turn red or yellow in autumn.",
)
PROMPTS = [CandidateSet(f"p{i}", question) for i, question in enumerate(QUESTIONS)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 16}
SAMPLED: dict[str, Any] = {"n": 3, "max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95}


def policy(template: str = "auto", adapter: str = "", name: str = "me", **sampling: Any) -> Policy:
    return Policy(name, "vllm", template=template, adapter=adapter, sampling=SamplingParams(**sampling))


def engine(**settings: Any) -> VLLMEngine:
    return VLLMEngine(policy(**settings))


def reference(**settings: Any) -> HFEngine:
    return HFEngine(policy(**settings))


def ids_of(row: list[Response]) -> list[list[int]]:
    return [response.tokens["ids"] for response in row if response.tokens is not None]


@pytest.fixture(scope="module", autouse=True)
def weights() -> Iterator[None]:
    """Holds the model, which goes with its last engine, from the first test to the last."""
    held = engine()
    yield
    del held


# --- against engine hf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["auto", "hh"])
def test_greedy_answers_equal_those_of_engine_hf(template: str) -> None:
    answers = engine(template=template, **GREEDY).generate(PROMPTS)
    assert answers == reference(template=template, **GREEDY).generate(PROMPTS)
    assert {response.finished for (response,) in answers} == {True, False}


def test_greedy_answers_are_written_once() -> None:
    ((first, second),) = engine(n=2, **GREEDY).generate(PROMPTS[:1])
    assert (first.text, first.sampling["index"], second.sampling["index"]) == (second.text, 0, 1)
    assert len(engine(n=2, **GREEDY).batches(PROMPTS * 60)) == 2


@pytest.mark.parametrize("stop", [(":",), (" is", "ice"), ("no such string",)])
def test_stop_strings_cut_as_in_engine_hf(stop: tuple[str, ...]) -> None:
    answers = engine(stop=stop, **GREEDY).generate(PROMPTS)
    assert answers == reference(stop=stop, **GREEDY).generate(PROMPTS)
    assert not any(mark in response.text for (response,) in answers for mark in stop)


def test_the_token_limit_leaves_an_answer_unfinished() -> None:
    answers = engine(n=2, max_new_tokens=3, seed=4).generate(PROMPTS[2:])
    assert all(not r.finished and len(ids) == 3 for row in answers for r, ids in zip(row, ids_of(row), strict=True))
    assert answers[0][1].sampling == {"temperature": 1.0, "seed": 4, "max_new_tokens": 3, "index": 1}


@pytest.mark.parametrize(
    ("settings", "most"), [({"top_k": 1}, 1), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1), ({"top_k": 2}, 2)]
)
def test_filters_leave_the_likeliest_tokens(settings: dict[str, Any], most: int) -> None:
    """First tokens of 24 answers against the likeliest of transformers' logits."""
    made = reference()
    with torch.inference_mode():
        logits = made.model(torch.tensor([made._encode(PROMPTS[2])])).logits[0, -1]
    (row,) = engine(n=24, max_new_tokens=1, temperature=1.5, **settings).generate(PROMPTS[2:3])
    assert {ids[0] for ids in ids_of(row)} == set(logits.topk(most).indices.tolist())


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_answers_differ_and_repeat_whatever_their_batch() -> None:
    together = engine(**SAMPLED).generate(PROMPTS)
    assert all(len({response.text for response in row}) > 1 for row in together)
    assert engine(**SAMPLED).generate(PROMPTS) == together
    assert engine(**SAMPLED).generate(PROMPTS[::-1])[::-1] == together
    assert [engine(**SAMPLED).generate([prompt])[0] for prompt in PROMPTS] == together


def test_every_part_of_the_seed_counts() -> None:
    def answers(prompt: CandidateSet = PROMPTS[2], **more: Any) -> list[list[int]]:
        return ids_of(engine(**{"n": 2, "max_new_tokens": 8, **more}).generate([prompt])[0])

    base = answers()
    assert base[0] != base[1]
    assert answers(n=1) == base[:1]
    for other in (answers(seed=1), answers(name="other"), answers(dataclasses.replace(PROMPTS[2], id="else"))):
        assert not any(ids in base for ids in other)


# --- adapters, limits and memory -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA adapter of rank 6 that changes much."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = get_peft_model(models.load_policy("default"), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.mul_(0.5)
    folder = str(tmp_path_factory.mktemp("adapter"))
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_says_what_it_says_in_engine_hf_and_models_make_room(adapter: str) -> None:
    made, plain = engine(adapter=adapter, **GREEDY), engine(**GREEDY)
    answers = made.generate(PROMPTS[:3])
    assert answers == reference(adapter=adapter, **GREEDY).generate(PROMPTS[:3])
    base = plain.generate(PROMPTS[:3])
    assert not made._loaded._held
    assert base == reference(**GREEDY).generate(PROMPTS[:3])
    assert sum(mine[0].text != other[0].text for mine, other in zip(answers, base, strict=True)) > 1


def test_an_adapter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder with an adapter_config"):
        engine(adapter=str(tmp_path), **GREEDY).generate(PROMPTS[:1])


def test_a_prompt_too_long_for_the_context() -> None:
    long = CandidateSet("long", "word " * 9000)
    made = engine(**GREEDY)
    assert made.batches([*PROMPTS, long])[0][0] == len(PROMPTS)
    with pytest.raises(InputError, match=r"prompt 'long' has 90\d\d tokens, .* exceeds the model's context of 8192"):
        made.generate([long])


def test_policies_share_weights() -> None:
    one, other = engine(**GREEDY), engine(**SAMPLED)
    assert one._loaded is other._loaded
    assert one._loaded is not engine(adapter="elsewhere", **GREEDY)._loaded


def test_sampling_on_the_command_line(tmp_path: Path) -> None:
    records.write(tmp_path / "prompts.jsonl", PROMPTS[:3])
    (tmp_path / "sample.yaml").write_text(
        "prompts: prompts.jsonl\noutput: unused\npolicies:\n"
        "  - {name: cool, engine: vllm, temperature: 0, max_new_tokens: 8}\n"
        "  - {name: warm, engine: vllm, n: 2, max_new_tokens: 8}\n"
    )
    output = tmp_path / "candidates.jsonl"
    command = [sys.executable, "-m", "rankalign", "sample", "--config", str(tmp_path / "sample.yaml"), "--json"]
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["responses"] == 9
    sampled = engine(name="warm", n=2, max_new_tokens=8).generate(PROMPTS[:3])
    found = list(records.read(output))
    assert [[r.policy for r in record.responses] for record in found] == [["cool", "warm", "warm"]] * 3
    assert [record.responses[1:] for record in found] == sampled
