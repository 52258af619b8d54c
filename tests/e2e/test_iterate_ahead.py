"""Online runs whose blocks are answered ahead, beside the training: by whom, kills, and the ratio to who wrote."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankalign.config import SampleConfig
from rankalign.data.records import CandidateSet, read
from rankalign.engines import Policy, SamplingParams
from rankalign.models import load as models
from rankalign.recipes.iterate import run
from rankalign.recipes.rounds import STRIDE
from rankalign.stages.generation import sample
from rankalign.storage.jsonl import read_rows
from tests.e2e.distributed import command, launch_and_kill
from tests.e2e.test_iterate import (
    REWARD,
    check_equal,
    content,
    files_in,
    fingerprint,
    own,
    save_prompts,
    seed_of_today,
    settings,
)
from tests.faults.children import finish, killed, start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    save_prompts(tmp_path / "prompts.jsonl", 10, 0)
    return tmp_path


def losses(path: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_rows(path / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_block_is_answered_by_the_weights_of_the_block_before(folder: Path, lora: bool) -> None:
    result = run(settings(folder, "op", refresh_every=2, ahead=1, train={"use_lora": lora}))
    assert [(row["steps"], row["refreshed_at"]) for row in result["rounds"]] == [(2, 0), (2, 0), (2, 2)]
    assert [(line["step"], line["refreshed_at"]) for line in losses(folder / "op")] == [
        (1, 0), (2, 0), (3, 0), (4, 0), (5, 2), (6, 2),
    ]  # fmt: skip
    checkpoint = folder / "op/model/checkpoint-2"
    models.load_tokenizer("tiny").save_pretrained(checkpoint)
    for number, step, model in ((2, 0, "tiny"), (3, 2, str(checkpoint))):
        found = own(folder / f"op/round-{number}/candidates.jsonl")
        assert {r.sampling["step"] for r in found} == {step}
        if not lora:
            assert {r.sampling["weights"] for r in found} == {fingerprint(model)}
        params = SamplingParams(n=3, max_new_tokens=8, seed=STRIDE * (number - 1))
        path = folder / f"{number}.jsonl"
        prompts = str(folder / f"op/round-{number}/prompts.jsonl")
        sample(SampleConfig(prompts, str(path), [Policy("own", model=model, sampling=params)]))
        assert [r.text for r in own(path)] == [r.text for r in found]
    assert not list((folder / "op").glob("round-*/weights"))


@pytest.mark.slow
def test_a_run_that_answers_ahead_survives_a_kill(folder: Path) -> None:
    seed = seed_of_today()
    print("RANKALIGN_SEED =", seed)
    rng, log = random.Random(seed), folder / "out.log"
    (folder / "c.yaml").write_text(json.dumps(content(folder, "whole", refresh_every=2, train={"save_steps": 1})))
    words = ["iterate", "--config", str(folder / "c.yaml"), "--async", "1", "--output"]
    assert finish([*words, str(folder / "whole")], log) == 0, log.read_text()
    total = files_in(folder / "whole")
    for moment in sorted(rng.sample(range(2, total * 3 // 4), 2)):
        process = start([*words, str(folder / "cut")], log)
        while process.is_alive() and files_in(folder / "cut") < moment:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        assert killed(process), log.read_text()
        time.sleep(0.5)  # the process beside it sees that, and goes
    assert finish([*words, str(folder / "cut")], log) == 0, log.read_text()
    check_equal(folder)


# --- the ratio to who wrote --------------------------------------------------------------------------------------


def logp(model: Any, record: CandidateSet, ids: list[int], finished: bool) -> float:
    """Log-probability of an answer by transformers' own forward, under the template of the tiny model."""
    tokenizer = models.load_tokenizer("tiny")
    chat = [{"role": "user", "content": record.prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = [*ids, tokenizer.eos_token_id] if finished else ids
    with torch.no_grad():
        rows = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(float(rows[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def rloo_clipped(model: Any, writer: Any, path: Path, ids: list[str]) -> float:
    """Mean loss of some prompts, written out: -min(c A, clip(c, 0.8, 1.2) A) with leave-one-out advantages."""
    total = 0.0
    for record in read(path):
        if record.id not in ids:
            continue
        rows = [(r.scores["share"], r) for r in record.responses for _ in range(r.count)]
        mean, losses = sum(score for score, _ in rows) / len(rows), []
        for score, r in rows:
            advantage = (score - mean) * len(rows) / (len(rows) - 1)
            drift = logp(model, record, r.tokens["ids"], r.finished) - logp(writer, record, r.tokens["ids"], r.finished)
            ratio = torch.tensor(drift).exp()
            losses.append(-float(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)))
        total += sum(losses) / len(losses)
    return total / len(ids)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_ratio_is_to_the_weights_that_wrote(folder: Path, ahead: int) -> None:
    more: dict[str, Any] = {"policies": [{"name": "own", "n": 3, "temperature": 1.0, "max_new_tokens": 8}]}
    more["train"] = {"loss": "rloo_clipped", "loss_options": {"epsilon_high": 0.2}, "save_steps": 1}
    run(settings(folder, "op", refresh_every=2, ahead=ahead, **more))
    lines = losses(folder / "op")
    if not ahead:
        assert all(abs(lines[i]["loss"]) < 1e-6 for i in (0, 2, 4))  # the ratio is 1, advantages add up to 0
        assert all(abs(lines[i]["loss"]) > 1e-3 for i in (3, 5))  # the first update has no rate yet
        return
    now, then = (AutoModelForCausalLM.from_pretrained(folder / f"op/model/checkpoint-{step}") for step in (4, 2))
    ids = [record.id for record in read(folder / "prompts.jsonl")][4:8]  # of the fifth update
    wanted = rloo_clipped(now, then, folder / "op/round-3/candidates.jsonl", ids)
    assert lines[4]["loss"] == pytest.approx(wanted, abs=2e-5)
    assert abs(wanted) > 1e-4


@pytest.mark.slow
def test_two_processes_with_a_third_beside_them(one_thread: None, folder: Path) -> None:
    more = {"refresh_every": 2, "ahead": 1, "train": {"save_steps": 1, "learning_rate": 1e-3}}
    run(settings(folder, "whole", **more))
    text = content(folder, "cut", **more)
    text["train"]["per_device_train_batch_size"] = 1
    (folder / "c.yaml").write_text(json.dumps(text))
    words = ["iterate", "--config", str(folder / "c.yaml")]
    assert launch_and_kill("ddp", words, lambda: files_in(folder / "cut") >= 20)
    time.sleep(1)
    done = os.spawnvpe(
        os.P_WAIT, command("ddp", words)[0], command("ddp", words), {**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done == 0
    for number in (1, 2, 3):
        path = f"round-{number}/candidates.jsonl"
        ours, theirs = (list(read(folder / name / path)) for name in ("whole", "cut"))
        assert [[r.text for r in s.responses] for s in ours] == [[r.text for r in s.responses] for s in theirs]
