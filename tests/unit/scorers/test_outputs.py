"""Several outputs of a reward model with weights, against plain transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.models import tiny
from rankalign.scorers.outputs import weighed_outputs
from rankalign.scorers.reward_model import RewardModelScorer

NAMES = ["helpfulness", "correctness", "verbosity"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny reward model of three named outputs."""
    torch.manual_seed(5)
    config = tiny.build_model().config
    config.id2label, config.pad_token_id = dict(enumerate(NAMES)), 0
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    target = tmp_path_factory.mktemp("rm")
    model.save_pretrained(target)
    tiny.build_tokenizer().save_pretrained(target)
    return str(target)


def test_the_score_is_the_weighted_sum_of_the_outputs(folder: str) -> None:
    user = [{"role": "user", "content": "Why?"}]
    sets = [CandidateSet("p", user, [Response("Because."), Response("So it is, and long.")])]
    tokenizer = tiny.build_tokenizer()
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for response in sets[0].responses:
        told = [*user, {"role": "assistant", "content": response.text}]
        ids = tokenizer.apply_chat_template(told, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        expected.append(float(0.65 * logits[0] + 0.8 * logits[1] - 0.4 * logits[2]))
    for axis in ("helpfulness:0.65,correctness:0.8,verbosity:-0.4", "0:0.65, 1:0.8, 2:-0.4"):
        assert RewardModelScorer("rm", folder, axis=axis).score(sets)[0] == pytest.approx(expected, abs=1e-5)


def test_lists_of_weights() -> None:
    assert weighed_outputs("verbosity:2,0:-1", NAMES) == {2: 2.0, 0: -1.0}
    assert weighed_outputs("mean", NAMES) == {}
    assert weighed_outputs("a:1", ["a:1"]) == {}
    for axis, said in (
        ("humour:1", "no output 'humour'"),
        ("3:1", "no output '3'"),
        ("0:1,helpfulness:2", "stands twice"),
        ("0:x", "no finite number: 'x'"),
        ("0:inf", "no finite number"),
    ):
        with pytest.raises(InputError, match=said):
            weighed_outputs(axis, NAMES)
