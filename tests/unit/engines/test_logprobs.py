"""Log-probabilities that engines keep with their answers: those of plain transformers, and those that servers send."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import ENGINES, Policy, SamplingParams, identity
from rankalign.engines.likeliest import merged
from rankalign.errors import InputError
from rankalign.models import load as models
from tests.faults.server import FaultServer

PROMPTS = [CandidateSet("a", "One two"), CandidateSet("b", "A longer prompt than the first one")]


def answers(engine: str, params: dict[str, Any], **more: Any) -> list[Response]:
    made = ENGINES.load(engine)(Policy("me", engine, "tiny", sampling=SamplingParams(**params), **more))
    return [response for row in made.generate(PROMPTS) for response in row]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_they_are_those_of_plain_transformers(temperature: float) -> None:
    found = answers("hf", {"n": 2, "max_new_tokens": 5, "temperature": temperature, "logprobs": 4}, template="raw")
    model, tokenizer = models.load_policy("tiny"), models.load_tokenizer("tiny")
    for number, response in enumerate(found):
        prompt = tokenizer(PROMPTS[number // 2].prompt)["input_ids"]
        ids = response.tokens["ids"]  # type: ignore[index]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).topk(4)
        told = response.meta["logprobs"]
        assert [entry["token"] for entry in told] == [
            tokenizer.decode([token], skip_special_tokens=True) for token in ids
        ]
        for entry, values, tokens in zip(told, expected.values, expected.indices, strict=True):
            texts = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
            wanted = dict.fromkeys(texts, 0.0)
            for text, value in zip(texts, values.tolist(), strict=True):
                wanted[text] += math.exp(value)
            assert {t: math.exp(v) for t, v in entry["top"].items()} == pytest.approx(wanted, abs=1e-6)


def test_they_change_no_answer_and_no_identity() -> None:
    plain, kept = (answers("hf", {"max_new_tokens": 6, "seed": 3, "logprobs": k}) for k in (0, 2))
    assert [r.text for r in plain] == [r.text for r in kept]
    assert not any("logprobs" in r.meta for r in plain)
    assert "logprobs" not in identity(Policy("me"))["sampling"]
    assert identity(Policy("me", sampling=SamplingParams(logprobs=3)))["sampling"]["logprobs"] == 3


CHAT = {"content": [
    {"token": "4", "logprob": -0.5, "top_logprobs": [
        {"token": "4", "logprob": -0.5}, {"token": " 4", "logprob": -1.5}, {"token": "x", "logprob": -9999.0}]},
]}  # fmt: skip
TEXT = {"tokens": ["4", "!"], "token_logprobs": [-0.5, -1], "top_logprobs": [{"4": -0.5, " 4": -1.5}, None]}


@pytest.mark.parametrize(
    ("template", "told", "asked", "found"),
    [
        (
            "chat",
            CHAT,
            {"logprobs": True, "top_logprobs": 3},
            [{"token": "4", "top": {"4": -0.5, " 4": -1.5, "x": -9999.0}}],
        ),
        ("raw", TEXT, {"logprobs": 3}, [{"token": "4", "top": {"4": -0.5, " 4": -1.5}}, {"token": "!", "top": {}}]),
        ("chat", None, {"logprobs": True}, None),
        ("chat", {"content": [{"token": "4"}]}, {"logprobs": True}, None),
        ("raw", {"tokens": ["4"], "top_logprobs": []}, {"logprobs": 3}, None),
    ],
)
def test_servers_are_asked_and_read(template: str, told: Any, asked: dict[str, Any], found: Any) -> None:
    def reply(request: dict[str, Any]) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": "4"}} if "messages" in request else {"text": "4"}
        return {"choices": [{"index": 0, "finish_reason": "stop", "logprobs": told, **said}]}

    with FaultServer(reply) as server:
        (response, *_) = answers("openai", {"temperature": 0, "logprobs": 3}, base_url=server.url, template=template)
        assert response.meta.get("logprobs") == found
        assert asked.items() <= server.requests[0].body.items()


def test_what_reads_the_same_is_added_up() -> None:
    assert merged([("a", math.log(0.2)), ("b", math.log(0.5)), ("a", math.log(0.1))]) == pytest.approx(
        {"a": math.log(0.3), "b": math.log(0.5)}
    )


@pytest.mark.parametrize(
    "params", [{"logprobs": 21}, {"logprobs": -1}, {"logprobs": 2, "num_beams": 2, "temperature": 0}]
)
def test_what_cannot_be_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="logprobs"):
        SamplingParams(**params)
