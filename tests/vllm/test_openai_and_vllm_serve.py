"""Engine ``openai`` against a real ``vllm serve`` on loopback; run by ``make test-vllm``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="vllm is not installed here; make test-vllm has an environment of its own")

from rankalign.data.records import CandidateSet
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.engines.openai import OpenAIEngine
from rankalign.errors import InputError
from rankalign.models import load as models
from tests.vllm.small import served

QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write one sentence about the sea.")
PROMPTS = [CandidateSet(f"p{i}", question) for i, question in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``vllm serve`` with the default model."""
    log = tmp_path_factory.mktemp("serve") / "log"
    words = ("--max-model-len", "2048", "--generation-config", "vllm")
    with served(models.resolve("default"), log, *words) as address:
        yield f"{address}/v1"


def engine(url: str, **settings: Any) -> OpenAIEngine:
    more = {key: settings.pop(key) for key in ("template", "model", "extra_body") if key in settings}
    policy: dict[str, Any] = {"model": "it", "base_url": url, **more}
    return OpenAIEngine(Policy("api", "openai", sampling=SamplingParams(**settings), **policy))


@pytest.mark.parametrize("template", ["chat", "raw"])
def test_greedy_answers_equal_those_of_engine_hf(url: str, template: str) -> None:
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    made = engine(url, template=template, **settings)
    answers = made.generate(PROMPTS)
    expected = HFEngine(Policy("api", template=template, sampling=SamplingParams(**settings))).generate(PROMPTS)
    assert [(r.text, r.finished) for (r,) in answers] == [(r.text, r.finished) for (r,) in expected]
    assert not made.notes.counts
    assert made.usage.requests == 3


def test_answers_differ_and_repeat(url: str) -> None:
    made = engine(url, n=3, max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=5)
    answers = made.generate(PROMPTS)
    assert all(len({response.text for response in row}) > 1 for row in answers)
    assert not made.notes.counts  # seed, top_k and min_p were tried, and are obeyed
    again = engine(url, n=3, max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=5)
    assert [[r.text for r in row] for row in again.generate(PROMPTS)] == [[r.text for r in row] for row in answers]


def test_stop_strings_end_an_answer(url: str) -> None:
    (row,) = engine(url, temperature=0, max_new_tokens=30, stop=(" capital",)).generate(PROMPTS[:1])
    assert (row[0].text, row[0].finished) == ("The", True)


def test_a_model_that_is_not_there(url: str) -> None:
    with pytest.raises(InputError, match=r"404.*no-such-model"):
        engine(url, model="no-such-model", temperature=0).generate(PROMPTS[:1])
