"""Each example at tiny size: the commands of its run.sh, taken down by stand-ins and run in this process.

The slow suite runs the same shell scripts as people do, each command in a process of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankalign.cli import main
from rankalign.storage.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "tldr": ("start", "sft", "rrhf", "ppo", "human"),
    "sentiment": ("start", "rrhf", "ppo", "ppo-no-kl"),
    "stack": ("start", "sft", "dpo", "response_k", "response_j"),
    "wombat": ("base", "wombat", "output"),
    "judge": ("start", "sft", "dpo"),
}
NUMBERS = {
    "tldr": {"rm", "ROUGE-1", "ROUGE-2", "ROUGE-L", "repetition"},
    "sentiment": {"vader", "perplexity", "KL", "repetition"},
    "stack": {"rm", "ROUGE-L", "repetition"},
    "wombat": {"rules", "ROUGE-L", "repetition"},
    "judge": {"right", "repetition"},
}
SMALL = {"n": 2, "max_new_tokens": 6, "max_steps": 1, "rollouts": 4, "ppo_epochs": 1, "num_train_epochs": 1}
RECORDS = 6
STUB = """
def letters(samples, outputs, **metadata):
    return [sum(sign.isascii() for sign in text) / max(len(text), 1) for text in outputs]
"""  # noise of a tiny model is neutral to VADER, and no verdict, so that nothing could be ranked
STAND_IN = """#!/bin/sh
{ printf '%s\\n' "$(basename "$0")" "$@"; echo; } >> "$COMMANDS"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples with few records and short answers, in a checkout of their own."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data_generation/judge_prompts", folder / "data_generation/judge_prompts")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))  # older than the environment, so that make leaves that alone
    for path in folder.glob("examples/*/data/*.jsonl"):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:RECORDS]))
    for path in folder.glob("examples/*/configs/*.yaml"):
        text = path.read_text(encoding="utf-8").replace("rankalign.scorers.builtin:vader", "configs/stub.py:letters")
        text = text.replace("configs/right.py:right", "configs/stub.py:letters")
        path.write_text(json.dumps(_small(yaml.safe_load(text))))  # JSON is YAML
    for name in ("sentiment", "judge"):
        (folder / f"examples/{name}/configs/stub.py").write_text(STUB)
    return folder


def _small(value: Any) -> Any:
    if isinstance(value, list):
        return [_small(item) for item in value]
    if isinstance(value, dict):
        value |= {"warmup_steps": 0} if "learning_rate" in value else {}  # or a single update moves nothing
        return {key: min(item, SMALL[key]) if key in SMALL else _small(item) for key, item in value.items()}
    return value


def arguments(name: str, out: Path) -> list[str]:
    """Of run.sh; no tiny model has room for a judge's question, let alone sense."""
    return ["tiny", str(out), *(["rules"] if name == "wombat" else [])]


def commands(checkout: Path, name: str, out: Path) -> Iterator[list[str]]:
    """The words of each command that run.sh would run."""
    stand_ins, taken = checkout / ".venv/bin", out.parent / "commands"
    if not stand_ins.exists():
        stand_ins.mkdir(parents=True)
        for program in ("rankalign", "python"):
            (stand_ins / program).write_text(STAND_IN)
            (stand_ins / program).chmod(0o755)
        (checkout / ".venv/.ready").touch()
    taken.unlink(missing_ok=True)
    script = ["bash", str(checkout / f"examples/{name}/run.sh"), *arguments(name, out)]
    subprocess.run(script, check=True, env={**os.environ, "COMMANDS": str(taken)}, capture_output=True)
    for block in taken.read_text().removesuffix("\n\n").split("\n\n"):
        yield block.split("\n")


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command, here."""
    if words[0] == "rankalign":
        assert main(words[1:]) == 0, words
    elif words[1] == "-c":
        exec(words[2], {})
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")


def times(out: Path) -> dict[str, int]:
    """When each file that a stage leaves was last written; a conversion, a copy and the table are made anew."""
    again = {"table.json", "pairs.jsonl", "pairs.test.jsonl", "train.jsonl", "train.test.jsonl"}
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    made = [path for path in files if path.parts[0] not in {"configs", "data", "judge_prompts"} | again]
    return {str(path): (out / path).stat().st_mtime_ns for path in made}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_of(
    name: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    monkeypatch.setenv("RANKALIGN_DEFAULT_MODEL", "tiny")
    for words in commands(checkout, name, out):
        monkeypatch.chdir(out)
        execute(words, monkeypatch)
    check_run(name, out, capsys.readouterr().out)
    before = times(out)
    stages = 0
    for words in commands(checkout, name, out):
        execute(words, monkeypatch)
        stages += words[1] in ("train", "sample", "score")
    assert capsys.readouterr().err.count("nothing to do") == stages >= 5
    assert times(out) == before


def check_run(name: str, out: Path, shown: str) -> None:
    """Files and table of a finished run."""
    table = json.loads((out / "table.json").read_text())
    assert table["title"] in shown
    assert tuple(table["columns"]) == ("", *EXAMPLES[name])
    numbers = {row[0]: dict(zip(EXAMPLES[name], row[1:], strict=True)) for row in table["rows"]}
    assert numbers.keys() >= NUMBERS[name]
    assert all(0 <= share < 1 for share in numbers["repetition"].values())
    for policy in [p for p in EXAMPLES[name] if (out / p).is_dir()]:
        assert (out / policy / "manifest.json").is_file() or (name, policy) == ("stack", "sft")
    if name == "tldr":
        assert numbers["rm"]["human"] == 0.0  # the reference less itself
        assert numbers["rm"]["start"] != 0.0
    if name == "sentiment":
        assert numbers["KL"]["start"] == 0.0
        assert all(value > 1 for value in numbers["perplexity"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_shell_script_of(name: str, checkout: Path, tmp_path: Path) -> None:
    if not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("the scripts use the environment that make builds, and this one is another")
    here = tmp_path / "checkout"
    shutil.copytree(checkout, here, ignore=shutil.ignore_patterns(".venv"))
    (here / ".venv").symlink_to(ROOT / ".venv")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = ["bash", str(here / f"examples/{name}/run.sh"), *arguments(name, tmp_path / "out")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(name, tmp_path / "out", done.stdout)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_data_are_whole_and_kept_apart(name: str) -> None:
    rows = [row for path in sorted((ROOT / f"examples/{name}/data").glob("*.jsonl")) for _, row in read_rows(path)]
    keys = [row.get("prompt") or row.get("question") or row["instruction"] + row["input"] for row in rows]
    assert len(set(keys)) == len(keys) >= 50


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_run_is_one_short_script(name: str) -> None:
    lines = (ROOT / f"examples/{name}/run.sh").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("#")]) < 20
