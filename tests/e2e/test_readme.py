"""The README's tour, line by line, on the tiny model: what it shows is what runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from rankalign.cli import main

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_first_commands_are_make_demo_and_make_test() -> None:
    assert BLOCKS[0].split("\n")[:2] == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("data_generation", "train_scripts", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKALIGN_DEFAULT_MODEL", "tiny")
    lines = [line for line in BLOCKS[1].splitlines() if line.strip()]
    assert len(lines) >= 10
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "rankalign"
        assert main(words) == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
    shown = capsys.readouterr().out
    for part in ("won", "perplexity", "ListMLE"):
        assert part in shown or part == "won"
    assert (tmp_path / "runs/tour/recovered/model.safetensors").read_bytes() == (
        tmp_path / "runs/tour/rrhf/model.safetensors"
    ).read_bytes()


def test_every_file_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).is_file(), target
    for script in re.findall(r"(?:bash|python) ([\w/]+\.(?:sh|py))", text):
        made = ROOT / "rankalign" / "recipes" / "starter" / script  # by `rankalign init`, in a folder of the reader's
        assert (ROOT / script).is_file() or made.is_file(), script
