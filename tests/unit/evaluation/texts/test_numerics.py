"""Drift of log-probabilities by precision, and the pairs whose order it puts in doubt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.evaluation.texts.numerics import drift, encode, evaluate_numerics, judge_pairs, token_values
from rankalign.models import tiny

TOKENIZER = tiny.build_tokenizer()


def record(ident: str, *texts: str) -> CandidateSet:
    return CandidateSet(ident, "say something", [Response(text) for text in texts])


def sets() -> list[CandidateSet]:
    words = ["alpha", "beta gamma", "delta epsilon zeta", "eta", "theta iota", "kappa lambda mu nu"]
    return [record(f"p{i}", *words[i:], *words[:i]) for i in range(4)]


def test_drift_by_hand() -> None:
    exact = [[np.array([-1.0, -2.0]), np.array([-3.0])]]
    found = [[np.array([-1.1, -2.2]), np.array([-2.9])]]
    assert drift(exact, found) == pytest.approx({"drift": 0.4 / 3, "max_drift": 0.3})


def test_pairs_by_hand() -> None:
    """Twenty-one pairs: the drifts apart are 0.1 but for two of 0.5 and 1, so 95 % of them are at most 0.5."""
    exact = [[np.array([gap]), np.array([0.0])] for gap in (0.05, 0.6, *[2.0] * 18, 0.4)]
    shifts = (-0.1, -1.0, *[0.1] * 18, 0.5)
    found = [[row[0] + shift, row[1]] for row, shift in zip(exact, shifts, strict=True)]
    unstable, changed = judge_pairs(exact, found, [(p, 0, 1) for p in range(21)])
    assert [pair[0] for pair in unstable] == [0, 20]  # 0.05 and 0.4 lie within 0.5, 0.6 does not, though it turned
    assert changed == 2


def test_a_planted_near_tie_is_unstable_and_a_clear_order_is_not() -> None:
    model = tiny.build_model()
    near = record("near", "the same words", "the same words")
    result = evaluate_numerics(model, TOKENIZER, [*sets(), near], ("float32", "bfloat16"))
    assert result.n == 5
    assert result.metrics["pairs"] == 4 * 15 + 1
    for mode in ("float32", "bfloat16"):
        found = [row for row in result.rows if row["mode"] == mode]
        assert {"id": "near", "a": 0, "b": 1, "mode": mode, "gap": 0.0} in found
        assert len(found) == result.metrics[f"{mode}_unstable"]
    assert result.metrics["float32_unstable"] < 5
    assert result.rows[0]["gap"] == 0.0


def test_precisions_drift_by_their_rounding() -> None:
    metrics = evaluate_numerics(tiny.build_model(), TOKENIZER, sets(), ("float32", "float16", "bfloat16")).metrics
    assert 0 < metrics["float32_drift"] < 1e-5 < metrics["float16_drift"] < metrics["bfloat16_drift"] < 0.1
    assert metrics["bfloat16_max_drift"] > metrics["bfloat16_drift"]


def test_values_are_the_models_own() -> None:
    model = tiny.build_model()
    prompt, responses = encode(TOKENIZER, sets()[0], "auto", 512)
    [rows] = token_values(model, [(prompt, responses)], torch.float32, None, "padded")
    for ids, values in zip(responses, rows, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        np.testing.assert_allclose(values, wanted.detach().double().numpy(), atol=1e-5)


def test_bad_requests() -> None:
    with pytest.raises(InputError, match="float32"):
        evaluate_numerics(tiny.build_model(), TOKENIZER, sets(), ("float23",))
    with pytest.raises(InputError, match="two responses"):
        evaluate_numerics(tiny.build_model(), TOKENIZER, [record("a", "one")])
