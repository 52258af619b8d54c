"""Reward models with an output an axis, against plain torch over plain transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rankalign.cli import main
from rankalign.data.records import read
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.rows import rewards

AXES = ("helpfulness", "correctness", "verbosity")
# HelpSteer's own form: a row an answer, axes from 0 to 4; the third question has one answer alone.
ROWS = [
    ("Why is rain wet?", "Because it is water.", (3, 4, 1)),
    ("Why is rain wet?", "It is not.", (0, 0, 2)),
    ("Name a colour.", "Blue is one of them, and so is red.", (4, 4, 3)),
    ("Name a colour.", "Seven.", (1, 0, 0)),
    ("Say hello.", "Hello!", (4, 3, 0)),
]
TRAIN = ["--method", "reward", "--loss", "quality", "--loss_options", '{"low": 0, "high": 4}', "--axes", ",".join(AXES)]
PLAIN = ["--use_cpu", "True", "--disable_tqdm", "True", "--optim", "sgd", "--max_grad_norm", "0", "--warmup_steps", "0"]
ONE = ["--max_steps", "1", "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data.jsonl``, and ``rm``, the tiny policy after one step of plain gradient descent."""
    where = tmp_path_factory.mktemp("axes")
    rows = [{"prompt": p, "response": r, **dict(zip(AXES, v, strict=True))} for p, r, v in ROWS]
    (where / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model", "tiny", "--data", f"{where}/data.jsonl", "--output_dir", f"{where}/rm", *TRAIN, *PLAIN]
    assert main([*words, *ONE, "--learning_rate", "0.5"]) == 0
    return where


def texts(tokenizer: Any) -> list[list[int]]:
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r, _ in ROWS]
    return [tokenizer.apply_chat_template(t, tokenize=True, return_dict=False) for t in turns]


def outputs(model: Any, tokenizer: Any) -> torch.Tensor:
    """(answers, axes), one plain forward each."""
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0] for ids in texts(tokenizer)])


def test_one_step_is_plain_transformers_step(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(models.resolve("tiny"), num_labels=3)
    plain.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.zeros_(plain.score.weight)
    targets = torch.tensor([values for _, _, values in ROWS]) / 4
    each = (torch.sigmoid(outputs(plain.eval(), tokenizer)) - targets).abs().mean(1)
    loss = torch.stack([each[0:2].mean(), each[2:4].mean(), each[4]]).mean()  # a mean over prompts
    loss.backward()
    with torch.no_grad():
        for weight in plain.parameters():
            if weight.grad is not None:
                weight -= 0.5 * weight.grad
    first = json.loads((folder / "rm/log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(loss.item(), abs=1e-6)
    by_axis = (0.5 - targets).abs()  # a head of zeros says one half
    for axis, column in zip(AXES, by_axis.unbind(1), strict=True):
        mean = torch.stack([column[0:2].mean(), column[2:4].mean(), column[4]]).mean()
        assert first[f"l1_{axis}"] == pytest.approx(mean.item(), abs=1e-6)
    trained = dict(AutoModelForSequenceClassification.from_pretrained(folder / "rm").named_parameters())
    assert trained["score.weight"].shape == (3, 32)
    assert trained["score.weight"].abs().max() > 1e-3
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=2e-6)


def test_any_tool_knows_the_axes(folder: Path) -> None:
    config = json.loads((folder / "rm/config.json").read_text())
    assert config["id2label"] == {"0": "helpfulness", "1": "correctness", "2": "verbosity"}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm")
    assert model.config.num_labels == 3
    text = tokenizer.decode(texts(tokenizer)[0])
    said = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(
        [text], add_special_tokens=False
    )
    with torch.no_grad():
        wanted = torch.sigmoid(outputs(model, tokenizer)[0]).tolist()
    assert {each["label"]: each["score"] for each in said[0]} == pytest.approx(dict(zip(AXES, wanted, strict=True)))


@pytest.mark.parametrize(("axis", "columns"), [("correctness", [1]), ("2", [2]), ("mean", [0, 1, 2])])
def test_scores_are_plain_outputs(folder: Path, tmp_path: Path, axis: str, columns: list[int]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
    with torch.no_grad():
        wanted = outputs(model, AutoTokenizer.from_pretrained(folder / "rm"))[:, columns].mean(1).tolist()
    words = ["score", "--input", f"{folder}/data.jsonl", "--output", f"{tmp_path}/out.jsonl"]
    assert main([*words, "--reward_model", f"{folder}/rm", "--axis", axis]) == 0
    found = [r.scores[axis] for record in read(tmp_path / "out.jsonl") for r in record.responses]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert main(["eval", "reward", f"{tmp_path}/out.jsonl", "--judge", axis]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "--reward_model", "{rm}"], "choose an output of the scorer with `axis`"),
        (["score", "--reward_model", "{rm}", "--axis", "speed"], "has no output 'speed'; it has helpfulness, correct"),
        (["score", "--reward_model", "{rm}", "--axis", "3"], "has no output '3'"),
        (["score", "--function", "rankalign.scorers.builtin:vader", "--axis", "0"], "--axis chooses an output of"),
        (
            ["train", "--axes", "helpfulness,corectness"],
            "nothing is scored by 'corectness' .did you mean 'correctness'",
        ),
        (["train", "--axes", "helpfulness"], "name at least two judges"),
        (["train", "--axes", "helpfulness,helpfulness"], "each once"),
        (
            ["train", "--loss", "bradley_terry", "--loss_options", "{{}}"],
            "--axes is for --method reward --loss quality",
        ),
        (["train", "--use_lora", "True"], "an adapter has no config that could say it"),
        (["train", "--loss_options", '{{"low": 0, "high": 3}}'], "beyond the scale from 0 to 3"),
        (["train", "--judge", "helpfulness"], "--axes and --judge both say"),
        (["train", "--model", "{rm}", "--axes", "correctness,helpfulness,verbosity"], "says helpfulness, correctness"),
        (["train", "--model", "tiny-rm"], "has shape"),
    ],
)
def test_refusals(
    folder: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, more = f"{folder}/data.jsonl", [word.format(rm=folder / "rm") for word in words[1:]]
    usual = ["--input", data, "--output", f"{tmp_path}/out.jsonl"]
    if words[0] == "train":
        usual = ["--model", "tiny", "--data", data, "--output_dir", f"{tmp_path}/run", *TRAIN, *PLAIN, *ONE]
    assert main([words[0], *usual, *more]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_it_trains_on_and_ranks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", f"{folder}/rm", "--data", f"{folder}/data.jsonl", "--output_dir", f"{tmp_path}/run"]
    more = ["--max_steps", "60", "--learning_rate", "3e-3", "--optim", "adamw_torch", "--logging_steps", "20"]
    held_out = ["--eval_data", f"{folder}/data.jsonl", "--eval_strategy", "steps", "--eval_steps", "60"]
    assert main([*words, *TRAIN, *PLAIN, *more, *held_out, "--per_device_train_batch_size", "8"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if "eval_loss" in line)
    assert measured["eval_l1_helpfulness"] < 0.1
    assert measured["eval_ranking_accuracy"] == 1


def test_tree_and_padded_rows_agree() -> None:
    model = tiny.build_tiny_reward_model()
    model.score = torch.nn.Linear(32, 3, bias=False)
    lists = [[5, 6, 7], [8, 9]], [[[10, 11], [12], [13, 14, 15]], [[16]]]
    tree, padded = (rewards.list_rewards(model, *lists, layout=layout) for layout in ("tree", "padded"))
    assert tree.shape == (2, 3, 3)
    torch.testing.assert_close(tree, padded, rtol=0, atol=1e-6)
    assert tree[1, 1:].count_nonzero() == 0
