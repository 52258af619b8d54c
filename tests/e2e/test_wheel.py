"""The wheel alone is enough: nothing of the clone is reachable, and the project that `init` lays out trains."""

from __future__ import annotations

import ast
import filecmp
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rankalign.recipes.project import FOLDERS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose rankalign is an unpacked wheel, built from a copy of the repository, and no clone."""
    place = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "docs", "benchmarks", "*.egg-info")
    shutil.copytree(REPOSITORY, place / "clone", ignore=ignored)
    built = subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"],
        cwd=place / "clone", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    with zipfile.ZipFile(next((place / "clone").glob("*.whl"))) as wheel:
        wheel.extractall(place / "site")
    shutil.rmtree(place / "clone")
    command = place / "bin" / "rankalign"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rankalign "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PYTHONPATH": str(place / "site"), "PATH": f"{command.parent}:{os.environ['PATH']}"}


def call(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_both_lists_of_folders_are_one() -> None:
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    (told,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert ast.literal_eval(told) == FOLDERS


def test_a_project_without_a_clone_trains(installed: dict[str, str], tmp_path: Path) -> None:
    where = call([sys.executable, "-c", "import rankalign; print(rankalign.__file__)"], installed, tmp_path).stdout
    assert where.strip().startswith(installed["PYTHONPATH"])
    made = call(["rankalign", "init", "project"], installed, tmp_path)
    assert made.returncode == 0, made.stderr
    project = tmp_path / "project"
    for folder in FOLDERS:  # every file of the repository, byte for byte
        names = [path.name for path in (REPOSITORY / folder).iterdir() if path.is_file()]
        assert filecmp.cmpfiles(REPOSITORY / folder, project / folder, names, shallow=False) == (names, [], [])
    ran = call(["bash", "run.sh", "tiny", "--max_steps", "2"], installed, project)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (project / "runs/rrhf/model.safetensors").is_file()
    answers = [(project / f"runs/heldout/{name}.jsonl").read_text() for name in ("before", "after")]
    assert [text.count("\n") for text in answers] == [64, 64]
    assert answers[0] != answers[1]
    assert "(64 of 64)" in ran.stdout  # compare spoke of every answer


def test_the_demo_reads_its_own_prompts(installed: dict[str, str], tmp_path: Path) -> None:
    mine = tmp_path / "data_generation" / "demo"
    mine.mkdir(parents=True)
    (mine / "train.jsonl").write_text("not a record\n")  # in a project folder they may be anything
    flags = ["--model", "tiny", "--max_prompts", "2", "--output", "runs/demo"]
    ran = call(["rankalign", "demo", *flags], installed, tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (tmp_path / "runs/demo/report.html").is_file()
    assert (tmp_path / "runs/demo/result.json").is_file()


def test_init_touches_nothing_that_is_there(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    refused = call(["rankalign", "init", "full"], installed, tmp_path)
    assert (refused.returncode, "is not empty" in refused.stderr) == (1, True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "bare").mkdir()
    assert call(["rankalign", "init", "."], installed, tmp_path / "bare").returncode == 0
    assert not list((tmp_path / "bare").glob(".*"))
    assert (tmp_path / "bare" / "run.sh").is_file()
