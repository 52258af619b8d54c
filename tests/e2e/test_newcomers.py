"""Three newcomers, each typing nothing but what docs/first-hour.md shows, beside what they bring along."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankalign.cli import main
from rankalign.recipes import sweep
from rankalign.storage.jsonl import write_rows
from tests.unit.data.chat_families import tokenizer as family

PAGE = Path(__file__).resolve().parents[2] / "docs" / "first-hour.md"
SESSIONS = dict(re.findall(r"^## From (?:the )?(\w+).*?\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S))


def commands(session: str) -> list[str]:
    """What a session's fences tell a reader to type."""
    fences = re.findall(r"^```(?:bash)?\n(.*?)^```", SESSIONS[session], re.M | re.S)
    return [line for fence in fences for line in fence.splitlines() if line.strip()]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with a small chat model of Qwen's shape in it, and a cache that nobody used."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANKALIGN_CACHE", "RANKALIGN_TOKEN_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / ".cache" / name))
    monkeypatch.setattr(sweep, "start_process", lambda words: (main(["train", *words, "--json"]), ""))
    tokenizer = family("qwen-2.5")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **shape, **ends)
    Qwen2ForCausalLM(config).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    return tmp_path


def type_in(session: str) -> dict[str, str]:
    """Every command of a session, in this process; what each printed, by the command."""
    said: dict[str, str] = {}
    for line in commands(session):
        program, *words = shlex.split(line)
        assert program == "rankalign", line
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        assert code == 0, f"{line}\n{err.getvalue()[-2000:]}"
        assert "Traceback" not in err.getvalue()
        said[line] = out.getvalue() + err.getvalue()
    return said


def log(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def test_from_trl(desk: Path) -> None:
    import datasets

    def rows(count: int, first: int) -> datasets.Dataset:
        talk = [
            {
                "prompt": [{"role": "user", "content": f"Name colour number {i}."}],
                "chosen": [{"role": "assistant", "content": "Blue, of course."}],
                "rejected": [{"role": "assistant", "content": "no words yes"}],
            }
            for i in range(first, first + count)
        ]
        return datasets.Dataset.from_list(talk)

    datasets.DatasetDict({"train": rows(24, 0), "test": rows(8, 100)}).save_to_disk("prefs")
    said = type_in("TRL")
    measured = [line["eval_ranking_accuracy"] for line in log("runs/dpo") if "eval_loss" in line]
    assert measured[-1] == 1.0
    assert log("runs/dpo")[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference read the same
    assert Path("runs/dpo/report.html").stat().st_size > 10_000
    assert json.loads(Path("runs/sweep/sweep.json").read_text())["finished"] == 2
    (told,) = [text for line, text in said.items() if "convert-config" in line]
    assert "attn_implementation" in told


def test_from_rrhf(desk: Path) -> None:
    lists = [
        {"query": f"Why {i}?", "responses": ["yes of course", "no", "maybe the sea"], "scores": [2.0, -1.0, 0.5]}
        for i in range(16)
    ]
    write_rows(desk / "rrhf.json", lists)
    said = type_in("RRHF")
    (trained,) = [text for line, text in said.items() if "--data_path" in line]
    assert "--model_max_length 192 is now --max_length 192" in trained
    assert "note: --fsdp full_shard auto_wrap is left out" in trained
    assert "16 prompts, 48 candidates, 48 pairs" in trained
    recovered, target = (Path(name, "model.safetensors") for name in ("runs/recovered", "runs/rrhf"))
    assert recovered.read_bytes() == target.read_bytes()


def test_from_a_spreadsheet(desk: Path) -> None:
    with open("ratings.csv", "w", newline="", encoding="utf-8-sig") as out:
        writer = csv.writer(out, delimiter=";")
        writer.writerow(["Question", "Answer", "Stars", "Written by", "Remarks"])
        for i in range(12):
            writer.writerow([f"Why is {i} a number?", "It is; the sea, too.", 5, "Ann", ""])
            writer.writerow([f"Why is {i} a number?", '"no", she said', 2, "Bob", "rude"])
    type_in("a")
    records = [json.loads(line) for line in Path("ratings.jsonl").read_text("utf-8").splitlines()]
    assert len(records) == 12
    assert [response["scores"]["score"] for response in records[0]["responses"]] == [5, 2]
    assert records[0]["responses"][1]["text"] == '"no", she said'
    held_out = [line["eval_pairs"] for line in log("runs/ratings") if "eval_loss" in line]
    assert held_out
    assert 1 <= held_out[0] <= 6
    assert Path("runs/ratings/report.html").is_file()
    shutil.rmtree("runs/ratings")
    workbook = ["convert", "ratings.jsonl", "ratings.xlsx"]
    pytest.importorskip("openpyxl")
    assert main(workbook) == 0
    assert main(["convert", "ratings.xlsx", "again.jsonl"]) == 0
    again = [json.loads(line) for line in Path("again.jsonl").read_text("utf-8").splitlines()]
    for one, other in zip(records, again, strict=True):
        assert (one["id"], one["prompt"]) == (other["id"], other["prompt"])
        for a, b in zip(one["responses"], other["responses"], strict=True):
            assert (a["text"], a["policy"], a["scores"]) == (b["text"], b["policy"], b["scores"])


def test_the_page_has_the_three_sessions() -> None:
    assert [*SESSIONS] == ["TRL", "RRHF", "a"]
    assert all(len(commands(session)) >= 6 for session in SESSIONS)
