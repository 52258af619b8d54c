"""The KL estimate: exact on an enumerated distribution, by hand on tiny models, and zero for one model."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rankalign.data.encode import EncodeOptions, Encoder, encode_prompt
from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.evaluation.texts.divergence import evaluate_divergence, sequence_kl
from rankalign.models import tiny

TOKENIZER = tiny.build_tokenizer()


def test_draws_in_proportion_give_the_exact_divergence() -> None:
    policy, start, tokens = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6), (1, 2, 4)
    draws = [
        (math.log(p), math.log(q), n)
        for p, q, n in zip(policy, start, tokens, strict=True)
        for _ in range(round(10 * p))
    ]
    exact = sum(p * math.log(p / q) for p, q in zip(policy, start, strict=True))
    found = sequence_kl({"x": draws, "y": draws}).metrics
    assert found["kl"] == pytest.approx(exact, abs=1e-12)
    assert found["kl_per_token"] == pytest.approx(exact / (0.5 * 1 + 0.3 * 2 + 0.2 * 4), abs=1e-12)


def test_log_ratios_of_two_models_by_hand() -> None:
    start = tiny.build_model().double()
    policy = copy.deepcopy(start)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.sin(torch.arange(weight.numel(), dtype=torch.float64)).view_as(weight))
    sets = [
        CandidateSet("a", "say", [Response("abc", count=2), Response("")]),
        CandidateSet("b", "tell me", [Response("de", finished=False)]),
        CandidateSet("c", "nothing", [Response("", finished=False)]),
    ]
    ratios, encoder = {}, Encoder(TOKENIZER, EncodeOptions())
    for record in sets[:2]:
        prompt, own = encode_prompt(TOKENIZER, record.prompt, "auto"), []
        for response in [r for r in record.responses for _ in range(r.count)]:
            ids = encoder.response(response)
            logps = [model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for model in (policy, start)]
            sums = [sum(float(rows[len(prompt) + k - 1, t].detach()) for k, t in enumerate(ids)) for rows in logps]
            own.append(sums[0] - sums[1])
        ratios[record.id] = sum(own) / len(own)
    found = evaluate_divergence(policy, start, TOKENIZER, sets)
    assert found.metrics["kl"] == pytest.approx(sum(ratios.values()) / 2, abs=1e-9)
    assert (found.n, found.metrics["empty"]) == (2, 1)
    assert evaluate_divergence(start, start, TOKENIZER, sets).metrics["kl"] == 0


def test_nothing_to_estimate_from() -> None:
    with pytest.raises(InputError, match="no answer has a token"):
        sequence_kl({})
