"""Scorer ``reward_server`` against a real ``vllm serve`` of a reward model, beside plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="vllm is not installed here; make test-vllm has an environment of its own")

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankalign.data.records import CandidateSet, Response
from rankalign.recipes.rollouts import reward_of
from rankalign.scorers.reward_server import RewardServerScorer
from rankalign.training.arguments import parse_settings
from tests.vllm.small import save, served

TEXTS = ("Paris.", "It is Paris, I think.", "No.", "a b c d e f g " * 8)
SETS = [
    CandidateSet(f"p{i}", question, [Response(text, "a", True) for text in TEXTS])
    for i, question in enumerate(("What is the capital of France?", "Name a city.", "x"))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("reward") / "model", grades=True)


@pytest.fixture(scope="module")
def url(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with served(model, log, "--runner", "pooling", "--max-model-len", "512") as address:
        yield address


class Plain:
    """transformers' own forward, one text at a time."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def of(self, ids: list[int]) -> float:
        return float(self.model(torch.tensor([ids])).logits[0, 0])

    def of_text(self, text: str) -> float:
        return self.of(self.tokenizer(text)["input_ids"])

    def of_pair(self, prompt: str, answer: str) -> float:
        return self.of(self.tokenizer(prompt, answer)["input_ids"])

    def of_chat(self, prompt: str, answer: str) -> float:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self.of(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("form", ["classify", "pooling"])
def test_rewards_of_conversations_are_those_of_transformers(url: str, model: str, form: str) -> None:
    plain = Plain(model)
    found = RewardServerScorer("rm", f"{url}/{form}", model="it").score(SETS)
    wanted = [[plain.of_chat(str(s.prompt), r.text) for r in s.responses] for s in SETS]
    assert max(abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)) < 1e-6  # type: ignore[operator]
    assert len({round(value, 3) for row in wanted for value in row}) > 6  # the bound above means something


@pytest.mark.parametrize("form", ["classify", "pooling", "score"])
def test_rewards_of_texts_are_those_of_transformers(url: str, model: str, form: str) -> None:
    plain = Plain(model)
    found = RewardServerScorer("rm", f"{url}/{form}", model="it", template="raw").score(SETS)
    if form == "score":
        wanted = [[plain.of_pair(str(s.prompt), r.text) for r in s.responses] for s in SETS]
    else:
        wanted = [[plain.of_text(str(s.prompt) + r.text) for r in s.responses] for s in SETS]
    assert max(abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)) < 1e-6  # type: ignore[operator]


def test_a_server_is_the_reward_of_ppo(url: str, model: str, tmp_path: Path) -> None:
    fixed = {"method": "ppo", "model": "tiny", "data": str(tmp_path), "use_cpu": True, "output_dir": str(tmp_path)}
    config: Any = parse_settings({**fixed, "reward": f"{url}/classify", "reward_options": '{"model": "it"}'})
    one = [CandidateSet(s.id, s.prompt, s.responses[:1]) for s in SETS]
    plain = Plain(model)
    wanted = [plain.of_chat(str(s.prompt), s.responses[0].text) for s in one]
    assert reward_of(config)(one) == pytest.approx(wanted, abs=1e-6)
