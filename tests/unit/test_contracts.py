"""What every registered engine, scorer, loss and format must do; a new line in a registry is tested by being there."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.data.formats import FORMATS, Losses
from rankalign.data.records import CandidateSet, Response, to_dict
from rankalign.engines import ENGINES, Policy, SamplingParams
from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.losses.ranked import Ranked
from rankalign.scorers import SCORERS
from tests.faults.server import FaultServer, reward_server
from tests.unit.scorers.token_classifier import token_classifier

PROMPTS = [
    CandidateSet(
        f"p{i}",
        [{"role": "user", "content": "word " * (7 * i % 5 + 1)}],
        [Response(f"given {i}", "human"), Response("other", "human", scores={"old": 1.0})],
    )
    for i in range(5)
]


@functools.cache
def loopback() -> str:
    """A server for the engine that asks one."""
    return FaultServer().start().url


def policy(engine: str) -> Policy:
    more: dict[str, Any] = {"model": "tiny"}
    if engine == "openai":
        more["base_url"] = loopback()
    elif engine == "vllm":
        pytest.importorskip("vllm.version", reason="vllm is not installed here; make test-vllm runs this too")
        more["model"] = "default"  # it has no kernel for heads as narrow as those of the tiny model
    return Policy("me", engine, sampling=SamplingParams(n=2, max_new_tokens=6, seed=3), **more)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_answers_in_order_under_its_policys_name(engine: str) -> None:
    made = ENGINES.load(engine)(policy(engine))
    batches = made.batches(PROMPTS)
    assert sorted(i for batch in batches for i in batch) == list(range(5))
    assert batches == ENGINES.load(engine)(policy(engine)).batches(PROMPTS)
    before = copy.deepcopy(PROMPTS)
    for batch in batches:
        answers = made.generate([PROMPTS[i] for i in batch])
        assert len(answers) == len(batch)
        for responses in answers:
            assert len(responses) == 2
            assert all(isinstance(r.text, str) and r.policy == "me" for r in responses)
    assert before == PROMPTS


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_repeats_itself(engine: str) -> None:
    texts = [[[r.text for r in rs] for rs in ENGINES.load(engine)(policy(engine)).generate(PROMPTS)] for _ in range(2)]
    assert texts[0] == texts[1]


def scorer(kind: str, folder: Path) -> Any:
    (folder / "mine.py").write_text("def size(samples, prompts, outputs, **m):\n    return [len(o) for o in outputs]\n")
    row = {"name": "short", "type": "single", "prompt_template": "{answer}?", "output_format": "[[rating]]"}
    (folder / "judge.jsonl").write_text(json.dumps(row))
    options: dict[str, dict[str, Any]] = {
        "function": {"function": f"{folder}/mine.py:size"},
        "judge": {
            "policy": {"model": "tiny", "max_new_tokens": 8},
            "prompt": f"{folder}/judge.jsonl",
            "hardened": False,
            "repair": False,
        },
        "reward_model": {"model": "tiny-rm"},
        "reward_server": {"url": reward_server()},
        "token_rewards": {"model": token_classifier(folder)},
    }
    return SCORERS.load(kind)("judge", **options[kind])


@pytest.mark.parametrize("kind", SCORERS)
def test_a_scorer_grades_each_response_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    made, before = scorer(kind, tmp_path), copy.deepcopy(PROMPTS)
    grades = made.score(PROMPTS)
    assert before == PROMPTS
    assert [len(row) for row in grades] == [2] * 5
    assert all(value is None or math.isfinite(value) for row in grades for value in row)
    for again, row in zip(made.score(PROMPTS[::-1])[::-1], grades, strict=True):
        assert again == pytest.approx(row, abs=1e-5)
    assert made.name == "judge"
    assert made.fingerprint() == scorer(kind, tmp_path).fingerprint()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_a_summary_and_one_value_a_prompt(name: str) -> None:
    torch.manual_seed(0)
    logps = -torch.rand(3, 4, dtype=torch.float64) * 9
    ranked = Ranked(
        logps=logps,
        lengths=torch.randint(1, 9, (3, 4)),
        scores=torch.rand(3, 4, dtype=torch.float64),
        mask=torch.ones(3, 4, dtype=torch.bool),
        ref_logps=logps - 0.1 * torch.rand(3, 4, dtype=torch.float64),
        prompt_lengths=torch.tensor([1, 2, 3]),
        token_logps=(logps / 8)[:, :, None].expand(3, 4, 8),
        ref_token_logps=(logps / 9)[:, :, None].expand(3, 4, 8),
        log_squares=logps / 2,
        ref_kls=logps**2,
        own=torch.arange(4).expand(3, 4) % 2 == 0,
    )
    values = LOSSES[name].function(ranked)
    assert values.shape == (3,)
    assert torch.isfinite(values).all()
    assert len(LOSSES[name].summary) > 10


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_writes_rows_or_says_what_it_leaves_out(name: str) -> None:
    records = [
        CandidateSet(
            f"p{i}",
            [{"role": "user", "content": f"question {i}"}],
            [
                Response("good", "a", scores={"j": 2.0 + i}),
                Response("bad", "b", scores={"j": 1.0}),
            ],
        )
        for i in range(2)
    ]
    before, losses = [to_dict(record) for record in records], Losses()
    rows = list(FORMATS.load(name).write(records, losses))
    assert [to_dict(record) for record in records] == before
    assert rows or losses.counts
    assert all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("registry", [ENGINES, SCORERS, FORMATS], ids=lambda r: r.what)
def test_unknown_names_get_a_hint(registry: Any) -> None:
    first = next(iter(registry))
    with pytest.raises(InputError, match=f"unknown {registry.what} '{first}x'.*did you mean '{first}'"):
        registry.load(first + "x")
