"""The pages on logged numbers name every one that a run writes; the page on methods has the measured table's rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import rankalign
from rankalign.cli import main
from rankalign.storage.jsonl import write_rows

DOCS = Path(__file__).resolve().parents[2] / "docs"
MEASURE = "--eval_strategy steps --eval_steps 1 --max_steps 2"


def named(page: str) -> set[str]:
    """The names that a page's tables explain, with those that are the same on held-out data."""
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    return names | {f"eval_{name}" for name in names}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("grade.py").write_text("def grade(samples, prompts, outputs):\n    return [len(o) for o in outputs]\n")
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}"} for i in range(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "page"),
    [
        (f"--loss dpo --nll_weight 0.1 --watch grade.py:grade --batch_by tokens {MEASURE}", "logged-rank.md"),
        (f"--loss rrhf {MEASURE}", "logged-rank.md"),
        (f"--method sft {MEASURE}", "logged-rank.md"),
        (f"--method reward {MEASURE}", "logged-reward.md"),
    ],
)
def test_every_number_is_explained(flags: str, page: str, data: Path) -> None:
    words = ["train", "--model", "tiny", "--data", "pairs.jsonl", "--eval_data", "pairs.jsonl", *flags.split()]
    assert main([*words, "--output_dir", "out"]) == 0
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert {key for line in lines for key in line} - named(page) == set()


def test_every_number_of_ppo_is_explained(data: Path) -> None:
    sizes = "--rollouts 4 --max_new_tokens 4 --max_steps 1 --per_device_train_batch_size 2 --reward grade.py:grade"
    words = ["train", "--method", "ppo", "--model", "tiny", "--data", "pairs.jsonl", *sizes.split()]
    assert main([*words, "--output_dir", "out"]) == 0
    (line,) = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    names = named("logged-ppo.md")
    assert line.keys() - names == set()
    assert {name for name in names if not name.startswith("eval_")} - line.keys() == set()  # nothing that is not there


def test_the_page_on_methods_shows_what_was_measured() -> None:
    page, results = ((DOCS / name).read_text(encoding="utf-8") for name in ("which-method.md", "results.md"))
    shown = re.findall(r"^\| (?!row|---|you have).*\d\.?\d* .*\|$", page.split("## By what you have")[0], re.MULTILINE)
    assert len(shown) >= 16
    assert [row for row in shown if row not in results] == []


def test_data_are_located_once_and_a_watch_reads_what_is_held_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankalign.training import run

    located: list[str] = []
    plain = run.locate
    monkeypatch.setattr(run, "locate", lambda config: located.append(config.data) or plain(config))
    told = {"eval_split": 0.4, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "watch": "grade.py:grade"}
    rankalign.train("tiny", data="pairs.jsonl", loss="dpo", output_dir="watched", **told)
    words = ["train", "--model", "tiny", "--data", "pairs.jsonl", "--output_dir", "typed", "--loss", "dpo"]
    assert main([*words, *(word for name, value in told.items() for word in (f"--{name}", str(value)))]) == 0
    assert located == ["pairs.jsonl", "pairs.jsonl"]
    for folder in ("watched", "typed"):
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        measured = [line for line in lines if "eval_win_rate" in line]
        assert measured
        assert measured[0]["eval_watched"] == measured[0]["eval_pairs"]  # a pair a prompt, and all that is held out
