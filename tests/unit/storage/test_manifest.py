"""Manifests: checked from anywhere, wherever the folder went, with the stages beneath; old ones are still read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.storage import manifest


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, made with relative paths: data, a stage in the folder model, and the run's own files."""
    monkeypatch.chdir(tmp_path)
    model = Path("work/runs/demo/model")
    model.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        (model / name).write_text(f"content of {name}")
    Path("work/data.jsonl").write_text("data")
    Path("work/runs/demo/result.json").write_text("{}")
    manifest.write(model, "train", {"seed": 1}, ["work/data.jsonl"], sorted(model.iterdir()), steps=3)
    manifest.write("work/runs/demo", "run", {"seed": 1}, ["work/data.jsonl"], ["work/runs/demo/result.json"])
    return tmp_path / "work" / "runs" / "demo"


def verified(capsys: pytest.CaptureFixture[str], folder: Path | str) -> dict[str, Any]:
    code = main(["verify", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == found["exit_code"] == bool(found["changed"])
    return dict(found)


def names(found: dict[str, Any]) -> dict[str, str]:
    return {Path(entry["path"]).name: entry["reason"] for entry in found["changed"]}


def test_paths_are_relative_to_the_manifest(run: Path) -> None:
    content = json.loads((run / "model" / "manifest.json").read_text())
    assert list(content["inputs"]) == ["../../../data.jsonl"]
    assert list(content["outputs"]) == ["adapter_model.safetensors", "tokenizer.json"]
    assert str(run) not in json.dumps(content)


def test_an_intact_run_is_intact_from_everywhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, spelt in (("/", run), (run, "."), (run.parent, "demo"), (tmp_path, "work/runs/demo")):
        monkeypatch.chdir(place)
        found = verified(capsys, spelt)
        assert (found["files"], found["manifests"], found["changed"], found["missing"]) == (4, 2, [], [])


def test_a_copy_is_checked_where_it_lies(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "far" / "away" / "copy"
    shutil.copytree(run, copy)
    found = verified(capsys, copy)
    assert found["changed"] == []
    assert found["missing"]
    assert all(name.endswith("data.jsonl") for name in found["missing"])
    (copy / "model" / "adapter_model.safetensors").write_text("corrupted")
    (copy / "model" / "tokenizer.json").unlink()
    assert names(verified(capsys, copy)) == {"adapter_model.safetensors": "has changed", "tokenizer.json": "is gone"}
    assert names(verified(capsys, copy / "model")).keys() == {"adapter_model.safetensors", "tokenizer.json"}
    assert verified(capsys, run)["changed"] == []


def test_an_input_that_is_gone_from_its_place_is_a_change(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parents[1] / "data.jsonl").unlink()
    assert names(verified(capsys, run)) == {"data.jsonl": "is gone"}


def test_a_damaged_manifest_beneath_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "model" / "manifest.json").write_text("{")
    assert main(["verify", str(run)]) == 1
    assert "model/manifest.json" in capsys.readouterr().err


def test_manifests_with_paths_from_a_working_directory_are_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "old"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "data.jsonl").write_text("data")
    sha = {}
    for name in ("a.json", "inner/b.json"):
        (folder / name).write_text(name)
        sha[f"runs/old/{name}"] = hashlib.sha256(name.encode()).hexdigest()
    content = {"stage": "train", "settings": {"seed": 1}, "outputs": sha}
    content["inputs"] = {"data.jsonl": hashlib.sha256(b"data").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert verified(capsys, "runs/old")["changed"] == []
    assert manifest.is_finished(folder, {"seed": 1})
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "inner" / "b.json").write_text("other")
    assert names(verified(capsys, copy)) == {"b.json": "has changed"}
    with pytest.raises(InputError, match=r"b\.json has changed since it was made"):
        manifest.is_finished(copy, {"seed": 1})


def test_finished_is_asked_of_the_files_beside_the_manifest(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    monkeypatch.chdir("/")
    assert manifest.is_finished(tmp_path / "model", {"seed": 1})
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json is gone since it was made"):
        manifest.is_finished(tmp_path / "model", {"seed": 1})


def test_diff_reads_the_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copy(run.parents[1] / "data.jsonl", tmp_path.parent)
    (copy / "model" / "adapter_model.safetensors").write_text("other")
    (copy / "result.json").unlink()
    assert main(["diff", str(run), str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seen = {line.split(": ")[0] for line in found["differences"]}
    assert {"outputs.result.json", "stages.model/manifest.json.outputs.adapter_model.safetensors"} <= seen
    assert [line.split("copy/")[1] for line in found["changed"]] == [
        "result.json is gone since the run",
        "model/adapter_model.safetensors has changed since the run",
    ]
    assert main(["diff", str(run), str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"differences": [], "changed": []}
