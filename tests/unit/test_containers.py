"""The image and the development container: what can be held without a Docker daemon."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [
        (word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line)
    ]


def test_the_image_is_made_of_files_that_are_there_and_of_commands_that_a_shell_reads() -> None:
    found = instructions()
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    assert not found[0][1].endswith(":latest")
    for word, rest in found:
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
    users = [rest for word, rest in found if word == "USER"]
    assert users, "trains as root"
    assert users[-1] != "root"
    assert json.loads(dict(found)["ENTRYPOINT"]) == ["rankalign"]


def test_extras_that_the_image_installs_are_ours_and_torch_comes_first() -> None:
    runs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert runs[0].split()[-1] == "torch"
    assert all("-c constraints.txt" in rest for rest in runs)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"\.\[(.*?)\]", runs[-1])
    assert set(extras.split(",")) <= {*setup["options.extras_require"]}


def test_nothing_of_the_working_tree_that_is_no_source_goes_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    needed = {"rankalign", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert not needed & set(ignored)
    folders = re.findall(r'"((?:data_generation|eval|train_scripts)/\w+)"', (ROOT / "setup.py").read_text())
    assert folders
    assert not any(folder.startswith(tuple(ignored)) for folder in folders)


def test_the_development_container_is_json_and_its_commands_exist() -> None:
    told = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert told["hostRequirements"] == {"gpu": "optional"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert told["postCreateCommand"].removeprefix("make ") in targets


def test_no_host_of_anybodys_stands_in_them() -> None:
    for name in ("Dockerfile", ".dockerignore", ".devcontainer/devcontainer.json"):
        text = (ROOT / name).read_text(encoding="utf-8")
        hosts = re.findall(r"https?://([\w.-]+)|\b((?:\d{1,3}\.){3}\d{1,3})\b|--index-url", text)
        assert hosts == [], name
