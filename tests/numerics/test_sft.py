"""Supervised fine-tuning: what its loss is a mean of, and ROUGE on generations as the judge of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.evaluation.texts.likeness import RougeWatch, best_texts
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.recipes.rollouts import watch_of
from rankalign.training.arguments import TrainConfig, parse, parse_settings
from rankalign.training.run import train

TEXTS = ["red red rose", "blue sky blue", "the old oak", "rain and more rain"]


def sets_of(texts: list[str]) -> list[CandidateSet]:
    return [CandidateSet(f"p{i}", f"prompt {i}", [Response(text, "gold")]) for i, text in enumerate(texts)]


def settings(tmp_path: Path, name: str, **more: Any) -> TrainConfig:
    fixed = {"method": "sft", "model": "tiny", "data": str(tmp_path / "train.jsonl"), "template": "raw"}
    fixed |= {"output_dir": str(tmp_path / name), "use_cpu": True, "disable_tqdm": True, "save_total_limit": 20}
    fixed |= {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 8}
    fixed |= {"save_steps": 1, "gradient_accumulation_steps": 1}
    return parse_settings({**fixed, **more})


def test_labels_are_the_response_and_its_end_alone(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", sets_of(TEXTS[:2]))
    config = settings(tmp_path, "run", num_train_epochs=1, save_strategy="no", layout="padded")
    train(config)
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["loss"]
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model()
    means = []
    for record in sets_of(TEXTS[:2]):
        prompt = tokenizer(str(record.prompt))["input_ids"]
        answer = [*tokenizer(record.responses[0].text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([-100] * len(prompt) + answer)
        with torch.no_grad():
            means.append(cross_entropy(model(torch.tensor([prompt + answer])).logits[0, :-1], labels[1:]).item())
    assert logged == pytest.approx(sum(means) / 2, rel=1e-5)


def test_the_checkpoint_whose_answers_come_closest_is_the_one_kept(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", sets_of(TEXTS))
    train(settings(tmp_path, "plain", max_steps=5))
    written = {step: greedy(tmp_path / "plain" / f"checkpoint-{step}") for step in range(1, 6)}
    # What a checkpoint midway writes by itself, and no other does, is planted as the held-out responses.
    planted = next(k for k in (3, 2, 4) if all(written[k] != texts for step, texts in written.items() if step != k))
    write(tmp_path / "held.jsonl", sets_of(written[planted]))
    more = {"eval_data": str(tmp_path / "held.jsonl"), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
    more |= {"metric_for_best_model": "rougeL", "load_best_model_at_end": True, "save_total_limit": 2}
    config = settings(tmp_path, "kept", **more)
    train(config, watch_of)
    lines = [json.loads(line) for line in (tmp_path / "kept" / "log.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["eval_rougeL"] for line in lines if "eval_rougeL" in line}
    assert curve[planted] == 1.0
    assert all(value < 1 for step, value in curve.items() if step != planted)
    folders = [tmp_path / "kept", tmp_path / "plain" / f"checkpoint-{planted}", tmp_path / "plain"]
    kept, wanted, last = (models.weights_fingerprint(str(folder)) for folder in folders)
    assert kept == wanted != last


@pytest.mark.parametrize("flags", [["--method", "reward"], ["--eval_strategy", "no"], ["--eval_data", ""]])
def test_what_rouge_cannot_judge_is_refused(flags: list[str]) -> None:
    words = ["--method", "sft", "--eval_data", "held.jsonl", "--eval_strategy", "steps"]
    with pytest.raises(InputError, match="the best checkpoint by ROUGE needs"):
        parse(None, [*words, "--metric_for_best_model", "rouge2", *flags])


def test_answers_are_set_against_the_best_response() -> None:
    scored = [Response("one two", scores={"j": 1.0}), Response("three four", scores={"j": 2.0}), Response("x")]
    sets = [CandidateSet("a", "p", scored), CandidateSet("b", "p", [Response("y")])]
    assert best_texts(sets, "j") == {"a": "three four"}
    watch = RougeWatch(sets, best_texts(sets), lambda model, asked: ["three five"] * len(asked))
    assert watch(None) == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5, "rouge_prompts": 1.0}
    with pytest.raises(InputError, match="held-out prompts with a response"):
        RougeWatch(sets, {}, lambda model, asked: [])


def greedy(folder: Path, tokens: int = 14) -> list[str]:
    """Answers by plain argmax, one token at a time, apart from the package's own decoding."""
    model, tokenizer = models.load_policy(str(folder), dtype="float32"), tiny.build_tokenizer()
    found = []
    for i in range(len(TEXTS)):
        ids = tokenizer(f"prompt {i}")["input_ids"]
        start = len(ids)
        while len(ids) < start + tokens:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        found.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return found
