"""The shipped configurations of `rankalign iterate`: each runs, and its first loss is the closed form of its paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from rankalign.config import build
from rankalign.data.encode import EncodeOptions, encode_all
from rankalign.data.records import CandidateSet, Response, is_own, read, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.recipes.iterate import IterateConfig, run
from rankalign.storage.jsonl import read_rows
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train

CONFIGS = Path(__file__).resolve().parents[2] / "train_scripts" / "configs"
REWARD = """
def share(samples, prompts, outputs, **meta):
    return [sum(ord(c) % 7 for c in o) / max(len(o), 1) for o in outputs]
"""
LN2 = math.log(2)
PER_UPDATE = 8  # all prompts: IP draws them in an order of its own


class Answer(NamedTuple):
    """A candidate as plain numbers: log-prob under the start model, tokens, score, and whether the model wrote it."""

    logp: float
    length: int
    score: float
    own: bool


Answers = Sequence[Answer]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def pairs(answers: Answers) -> list[tuple[Answer, Answer]]:
    return [(w, y) for w in answers for y in answers if w.score > y.score]


def dpo(answers: Answers) -> float:
    return LN2 if pairs(answers) else 0.0


def rloo(answers: Answers) -> float:
    total, n = sum(a.score for a in answers), len(answers)
    return -mean([(a.score - (total - a.score) / (n - 1)) * a.logp for a in answers]) if pairs(answers) else 0.0


def grpo(answers: Answers) -> float:
    centre = mean([a.score for a in answers])
    spread = math.sqrt(sum((a.score - centre) ** 2 for a in answers) / max(len(answers) - 1, 1))
    return -mean([(a.score - centre) / (spread + 1e-4) * a.logp / a.length for a in answers])


def rebel(answers: Answers) -> float:
    return mean([(w.score - y.score) ** 2 for w, y in pairs(answers)])


def xpo(answers: Answers) -> float:
    return LN2 + 1e-5 * mean([a.logp for a in answers if not a.own]) if pairs(answers) else 0.0


def nash_md(answers: Answers) -> float:
    own, others = [a for a in answers if a.own], [a for a in answers if not a.own]
    shares = [mean([(1 + (a.score > o.score) - (a.score < o.score)) / 2 for o in others]) for a in own]
    return mean([-(p - 0.5) * a.logp for p, a in zip(shares, own, strict=True)]) if pairs(answers) else 0.0


def rrhf(answers: Answers) -> float:
    best = max(answers, key=lambda a: a.score)
    return sum(max(0.0, y.logp / y.length - w.logp / w.length) for w, y in pairs(answers)) - best.logp


def raft(answers: Answers) -> float:
    top = max(a.score for a in answers)
    return mean([-a.logp / a.length for a in answers if a.score == top])


FIRST: dict[str, Callable[[Answers], float]] = {
    "online_dpo": dpo,
    "rloo": rloo,
    "grpo": grpo,
    "rebel": rebel,
    "xpo": xpo,
    "nash_md": nash_md,
    "spin": dpo,
    "op": rrhf,
    "ip": rrhf,
    "raft": raft,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    words = ["red cat", "blue sea", "old new", "sea cat", "new blue", "old red", "cat old", "sea new"]
    write(
        tmp_path / "prompts.jsonl", [CandidateSet(f"p{i}", w, [Response("The sea.", "h")]) for i, w in enumerate(words)]
    )
    return tmp_path


def config_of(folder: Path, name: str, **more: Any) -> IterateConfig:
    """A shipped configuration with the tiny model, few prompts, short answers and two updates a round."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    content |= {"prompts": str(folder / "prompts.jsonl"), "output": str(folder / name), "model": "tiny"}
    content["policies"] = [p if "engine" in p else {**p, "max_new_tokens": 8, "stop": []} for p in content["policies"]]
    if content["judge"] == "vader":  # what the tiny model says has no sentiment
        content |= {"judge": "share"}
        content["scorers"] = [{"name": "share", "kind": "function", "function": f"{folder}/reward.py:share"}]
    if not content.get("refresh_every"):
        content["rounds"] = 2
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 2}
    content["train"] |= {**steps, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return build(IterateConfig, {**content, **more}, name)


def answers_of(path: Path, judge: str) -> list[list[Answer]]:
    """The lists of a round's records, log-probs by transformers alone, one response at a time."""
    model, sets = tiny.build_model().double().eval(), list(read(path))
    lists, _ = encode_all(sets, tiny.build_tokenizer(), EncodeOptions(judge=judge))
    owners = {record.id: [is_own(r) for r in record.responses] for record in sets}
    found = []
    for tokens in lists:
        row = []
        for response, score, own in zip(tokens.responses, tokens.scores, owners[tokens.id], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*tokens.prompt, *response]])).logits[0, len(tokens.prompt) - 1 : -1]
            logps = logits.log_softmax(-1)[range(len(response)), response]
            row.append(Answer(float(logps.sum()), len(response), score, own))
        found.append(row)
    return found


@pytest.mark.parametrize("name", FIRST)
def test_a_shipped_configuration_runs_and_starts_at_its_closed_form(folder: Path, name: str) -> None:
    config = config_of(folder, name, **({"kl_coef": 0.0} if name in ("op", "rloo", "grpo") else {}))
    result = run(config)
    assert result["steps"] == (2 if config.refresh_every else 4)
    first = answers_of(folder / name / "round-1/candidates.jsonl", config.judge)[:PER_UPDATE]
    lines = [row for _, row in read_rows(folder / name / "log.jsonl") if "loss" in row]
    assert lines[0]["loss"] == pytest.approx(mean([FIRST[name](row) for row in first]), rel=1e-4, abs=1e-6)
    assert lines[0]["loss"] != 0
    written = {p.name for p in config.policies if p.engine == "hf" and not p.start_share}
    for record in read(folder / name / "round-1/candidates.jsonl"):
        assert {r.policy for r in record.responses if is_own(r)} <= written
        assert any(is_own(r) for r in record.responses)


def test_every_shipped_configuration_of_iterate_is_tried_and_in_the_manual() -> None:
    manual = (CONFIGS.parents[1] / "docs" / "iterate.md").read_text()
    contents = {p.stem: yaml.safe_load(p.read_text()) for p in CONFIGS.glob("*.yaml")}
    assert {name for name, told in contents.items() if {"rounds", "refresh_every"} & told.keys()} == FIRST.keys()
    for name in FIRST:
        assert f"train_scripts/configs/{name}.yaml" in manual


def test_the_price_of_leaving_stands_in_the_reward(folder: Path) -> None:
    """With `kl_coef` the scores to train by are the judge's less the price; at the start there is none to pay."""
    config = config_of(folder, "rloo")
    run(config)
    for record in read(folder / "rloo/round-1/candidates.jsonl"):
        for response in record.responses:
            assert response.scores["kl"] == pytest.approx(0.0, abs=1e-5)
            assert response.scores["share-kl"] == pytest.approx(response.scores["share"], abs=1e-6)


@pytest.mark.parametrize(("share", "lora"), [(1.0, False), (0.7, False), (0.7, True)])
def test_draws_from_the_mixture_are_those_of_its_probabilities(folder: Path, share: float, lora: bool) -> None:
    """Greedy answers of the second block by the mixture, token by token from whole forward passes of the two models."""
    policies = [
        {"name": "drawn", "n": 1, "temperature": 1.0, "max_new_tokens": 6},
        {"name": "mixture", "n": 1, "start_share": share, "temperature": 0.0, "max_new_tokens": 6},
    ]
    config = config_of(folder, "nash_md", policies=policies)
    config.train.update(
        {"learning_rate": 0.05, "warmup_steps": 0, "save_steps": 1, "save_total_limit": 5, "use_lora": lora}
    )
    run(config)
    model, start = moved(folder / "nash_md/model/checkpoint-1", lora), tiny.build_model().eval()
    tokenizer, told = tiny.build_tokenizer(), 0
    for record in read(folder / "nash_md/round-2/candidates.jsonl"):
        (response,) = [r for r in record.responses if r.policy == "mixture"]
        assert response.sampling["start_share"] == share
        assert response.tokens is not None
        (tokens,), _ = encode_all([record], tokenizer, EncodeOptions(judge="share"))
        ids = list(tokens.prompt)
        for token in response.tokens["ids"]:
            with torch.no_grad():
                own, other = (m(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for m in (model, start))
            mixed = (1 - share) * own + share * other
            assert mixed[token] >= mixed.max() - 1e-4
            told += int(own.argmax() != mixed.argmax())
            ids.append(token)
    assert told  # the policy alone would have said something else


def moved(folder: Path, lora: bool) -> Any:
    """The policy of a checkpoint."""
    if lora:
        return models.load_policy("tiny", dtype="float32", adapter=str(folder)).eval()
    return models.load_policy(str(folder), dtype="float32").eval()


def test_other_places_have_no_start_model(folder: Path, tmp_path: Path) -> None:
    from rankalign.config import SampleConfig
    from rankalign.engines import Policy
    from rankalign.stages.generation import sample

    policy = Policy("own", model="tiny", start_share=0.5)
    with pytest.raises(InputError, match="start_share is a setting of `rankalign iterate`"):
        sample(SampleConfig(str(folder / "prompts.jsonl"), str(tmp_path / "out.jsonl"), [policy]))
    with pytest.raises(InputError, match="start_share is a setting of engine 'hf'"):
        Policy("own", engine="vllm", start_share=0.5)


@pytest.mark.parametrize("loss", ["xpo", "nash_md"])
def test_data_that_does_not_say_who_wrote_what_is_refused(tmp_path: Path, loss: str) -> None:
    answers = [Response("blue", scores={"j": 1.0}), Response("red", scores={"j": 0.0})]
    write(tmp_path / "pairs.jsonl", [CandidateSet("1", "say blue", answers)])
    fixed = {"model": "tiny", "data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match="needs to know which answers the model itself wrote"):
        train(parse_settings({**fixed, "loss": loss, "use_cpu": True, "max_steps": 1}))
