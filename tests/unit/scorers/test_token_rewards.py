"""Process rewards by a token classifier: the list and what is made of it, against plain transformers."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError, RecordError
from rankalign.scorers.token_rewards import TokenRewardScorer
from tests.unit.scorers.token_classifier import token_classifier

USER = {"role": "user", "content": "One and one?"}
SETS = [CandidateSet("p", [USER], [Response("Two."), Response("It is three, no, two.")]),
        CandidateSet("q", [USER], [Response("2", finished=False)])]  # fmt: skip


def plain(path: str, record: CandidateSet, response: Response) -> torch.Tensor:
    """(T, labels) of the answer's tokens: templated prompt, answer, end of the turn."""
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(record.prompt, add_generation_prompt=True, return_dict=False)
    said = tokenizer(response.text, add_special_tokens=False)["input_ids"]
    answer = said + ([tokenizer.eos_token_id] if response.finished else [])
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) :].double()


def test_the_list_is_what_plain_transformers_says(tmp_path: Path) -> None:
    path = token_classifier(tmp_path)
    makes = {"last": lambda row: row[-1], "mean": statistics.fmean, "min": min, "sum": sum}
    for tokens, make in makes.items():
        scorer = TokenRewardScorer("steps", path, tokens)
        scores = scorer.score(SETS)
        for record, row, told in zip(SETS, scores, scorer.explain(), strict=True):
            for response, score, kept in zip(record.responses, row, told.responses, strict=True):
                expected = plain(path, record, response)[:, 0].tolist()
                assert kept["token_scores"] == pytest.approx(expected, abs=1e-6)
                assert score == pytest.approx(make(expected), abs=1e-6)  # type: ignore[operator]


def test_of_several_outputs_one_is_chosen(tmp_path: Path) -> None:
    path = token_classifier(tmp_path, 3)
    whole = plain(path, SETS[0], SETS[0].responses[0])
    for axis, expected in (("1", whole[:, 1]), ("LABEL_2", whole[:, 2]), ("mean", whole.mean(-1))):
        found = TokenRewardScorer("steps", path, "mean", axis).score(SETS[:1])
        assert found[0][0] == pytest.approx(float(expected.mean()), abs=1e-6)
    with pytest.raises(InputError, match="has 3 outputs; choose one by `axis`"):
        TokenRewardScorer("steps", path).score(SETS)
    with pytest.raises(InputError, match="has no output '3'"):
        TokenRewardScorer("steps", path, axis=3).score(SETS)


def test_what_has_no_scores_is_refused_or_missing(tmp_path: Path) -> None:
    path = token_classifier(tmp_path)
    empty = CandidateSet("e", [USER], [Response("", finished=False)])
    assert TokenRewardScorer("steps", path).score([empty]) == [[None]]
    with pytest.raises(RecordError, match=r"more than 10: the last ones would have no score"):
        TokenRewardScorer("steps", path, max_length=10).score(SETS)
    options: list[tuple[dict[str, Any], str]] = [({"tokens": "max"}, "tokens: 'max' is unknown"),
                                                ({"thoughts": "x"}, "neither drop nor keep")]  # fmt: skip
    for more, said in options:
        with pytest.raises(InputError, match=said):
            TokenRewardScorer("steps", path, **more)
    with pytest.raises(InputError, match="is no token classifier, it lacks"):
        TokenRewardScorer("steps", "tiny").score(SETS)
