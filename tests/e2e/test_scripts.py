"""The four scripts as people call them: without arguments (`default` is tiny here), and on files of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.models import load as models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that shares its environment, so that the scripts write their runs elsewhere."""
    if not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("the scripts use the environment that make builds, and this one is another")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("data_generation", "train_scripts", "eval"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))  # older than the environment, so that make leaves that alone
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def call(folder: Path, *words: str, code: int = 0) -> str:
    """Run a script from ``folder``; its standard output."""
    env = {**os.environ, "RANKALIGN_DEFAULT_MODEL": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr if code else done.stdout


def test_without_arguments(checkout: Path) -> None:
    """compare.py needs what train.sh leaves, which needs what response_gen.sh leaves: one call runs all three."""
    shown = call(checkout, sys.executable, "eval/compare.py")
    assert "Pairwise comparison" in shown
    assert len(list(read(checkout / "runs/data/scored.jsonl"))) == 80
    assert (checkout / "runs/rrhf/manifest.json").is_file()
    call(checkout, "bash", "train_scripts/recover_weights.sh")
    weights = [(checkout / f"runs/{name}/model.safetensors").read_bytes() for name in ("rrhf", "recovered")]
    assert weights[0] == weights[1]
    assert "perplexity" in call(checkout, sys.executable, "eval/perplexity.py")
    assert "mean" in call(checkout, sys.executable, "eval/reward.py")


def test_on_models_and_files_of_the_users(checkout: Path, tmp_path: Path) -> None:
    model, out = models.resolve("tiny"), tmp_path / "out"
    call(checkout, "bash", "data_generation/response_gen.sh", model, str(out), "--max_prompts", "4")
    rows = [json.loads(line) for line in (out / "train.json").read_text().splitlines()]
    assert all(set(row) >= {"query", "responses", "scores"} for row in rows)
    save = tmp_path / "save"
    data = str(out / "train.json")
    flags = ("--num_train_epochs", "1", "--model_max_length", "192")
    call(checkout, "bash", "train_scripts/train.sh", model, str(save), data, *flags)
    assert (save / "model.safetensors").is_file()
    assert (
        "no such file" in call(checkout, "bash", "train_scripts/train.sh", model, str(save), "nowhere", code=1).lower()
    )


def test_compare_takes_any_two_files(checkout: Path, tmp_path: Path) -> None:
    for name, texts in (("a", ["great", "fine"]), ("b", ["awful", "fine"])):
        sets = [CandidateSet(f"p{i}", f"question {i}", [Response(text, name)]) for i, text in enumerate(texts)]
        write(tmp_path / f"{name}.jsonl", sets)
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    result = json.loads(call(checkout, sys.executable, "eval/compare.py", *files, "--json"))
    assert (result["systems"][0]["win"], result["systems"][0]["tie"], result["systems"][0]["loss"]) == (1, 1, 0)
    outputs = [{"instruction": f"question {i}", "output": "good", "generator": "m"} for i in range(2)]
    (tmp_path / "m.json").write_text(json.dumps(outputs))
    (tmp_path / "n.json").write_text(json.dumps([{**row, "output": "bad", "generator": "n"} for row in outputs]))
    files = (str(tmp_path / "m.json"), str(tmp_path / "n.json"))
    assert json.loads(call(checkout, sys.executable, "eval/compare.py", *files, "--json"))["systems"][0]["win"] == 2


def test_a_killed_response_gen_goes_on(checkout: Path, tmp_path: Path) -> None:
    """SIGKILL to the script and all it started, once in each stage; the end is that of a run nobody disturbed."""
    script = ["bash", "data_generation/response_gen.sh", models.resolve("tiny")]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call(checkout, *script, str(whole), "--max_prompts", "6")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("candidates.jsonl", "scored.jsonl"):
        words = [*script, str(cut), "--max_prompts", "6"]
        process = subprocess.Popen(words, cwd=checkout, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not (cut / f"{name}.journal").exists():
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    call(checkout, *script, str(cut), "--max_prompts", "6")
    for name in ("candidates.jsonl", "scored.jsonl", "train.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
