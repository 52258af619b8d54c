"""``device_map`` of engine ``hf`` and of the reward scorer: what is asked of transformers, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import ENGINES, Policy, SamplingParams
from rankalign.errors import InputError
from rankalign.models import devices
from rankalign.models import load as models
from rankalign.scorers.reward_model import RewardModelScorer

SETS = [CandidateSet("a", "Why?", [Response(text, finished=True) for text in ("because", "so it is", "no")])]


def test_answers_and_scores_are_those_of_one_device() -> None:
    sampling = SamplingParams(n=2, max_new_tokens=5)
    plain, mapped = (
        ENGINES.load("hf")(Policy("me", "hf", "tiny", device_map=name, sampling=sampling)).generate(SETS)
        for name in ("", "auto")
    )
    assert plain == mapped
    scores = [RewardModelScorer("rm", "tiny-rm", device_map=name).score(SETS) for name in ("", "balanced")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", devices.DEVICE_MAPS)
def test_transformers_is_asked_where_there_are_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.over_devices(name) == {"device_map": {"": "cpu"}}  # not the GPUs that --use_cpu leaves alone
    monkeypatch.setattr(devices, "device", lambda: torch.device("cuda"))
    assert devices.over_devices(name) == {"device_map": name}


def test_texts_run_padded_over_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for trees keep what they know of a row on one device; the scores are the same but for rounding."""
    scorer = RewardModelScorer("rm", "tiny-rm", device_map="auto")
    expected = RewardModelScorer("rm", "tiny-rm").score(SETS)[0]
    scorer.model.hf_device_map = {"model": 0, "score": 1}  # type: ignore[assignment]
    monkeypatch.setattr(scorer, "_in_trees", None)
    assert scorer.score(SETS)[0] == pytest.approx(expected, abs=1e-5)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(models.resolve("tiny-rm")).eval()
    ids = torch.tensor([scorer._encode(SETS[0], SETS[0].responses[0])])
    assert float(plain(input_ids=ids).logits) == pytest.approx(expected[0], abs=1e-5)


def test_unknown_names_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match=r"policy 'me': unknown device_map 'atuo' \(did you mean 'auto'\?\)"):
        ENGINES.load("hf")(Policy("me", "hf", "no-such-model", device_map="atuo"))
    with pytest.raises(InputError, match="scorer 'rm': unknown device_map 'cuda:1'"):
        RewardModelScorer("rm", "no-such-model", device_map="cuda:1")
