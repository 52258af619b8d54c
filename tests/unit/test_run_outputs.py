"""What a run may write over and what it may not, in words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.storage import outputs


def put(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_an_empty_and_a_begun_folder_stay_as_they_are(tmp_path: Path) -> None:
    outputs.begin(tmp_path / "new", {}, False)
    outputs.begin(tmp_path / "new", {}, True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    outputs.begin(tmp_path / "empty", {}, True)
    put(tmp_path / "run/log.jsonl")
    put(tmp_path / "run/model.safetensors")
    put(tmp_path / "beside/candidates.jsonl")
    put(tmp_path / "beside/train.log")
    before = tree(tmp_path)
    outputs.begin(tmp_path / "run", {}, False)
    for overwrite in (False, True):
        outputs.begin(tmp_path / "beside", {}, overwrite)
    assert tree(tmp_path) == before
    outputs.begin(tmp_path / "run", {}, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "adapter_model.bin"])
def test_what_no_run_left_stays(tmp_path: Path, name: str, overwrite: bool) -> None:
    put(tmp_path / "out" / name)
    with pytest.raises(InputError, match="no run left"):
        outputs.begin(tmp_path / "out", {}, overwrite)
    assert tree(tmp_path) == {f"out/{name}": b"mine"}


@pytest.mark.parametrize(
    ("reads", "overwrite", "said"),
    [
        ({"--model": "out"}, False, "is what --model names"),
        ({"--model": "./out/"}, True, "is what --model names"),
        ({"--model": "link"}, False, "is what --model names"),
        ({"--data": "out/data.jsonl"}, True, "would remove .*data.jsonl, which --data names"),
        ({"--data": "other.jsonl#5, out/data.jsonl#20:0.3"}, True, "which --data names"),
        ({"--model": "out/checkpoint-1"}, True, "which --model names"),
    ],
)
def test_what_a_run_reads_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: dict[str, str | None], overwrite: bool, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "out/log.jsonl")
    put(tmp_path / "out/data.jsonl")
    put(tmp_path / "out/checkpoint-1/model.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=said):
        outputs.begin(Path("out"), reads, overwrite)
    assert tree(tmp_path) == before


def test_what_lies_inside_is_read_where_nothing_is_removed(tmp_path: Path) -> None:
    put(tmp_path / "run/log.jsonl")
    data = put(tmp_path / "run/candidates.jsonl")
    outputs.begin(tmp_path / "run", {"--data": str(data), "--model": "tiny", "--eval_data": None}, False)


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_the_folder_one_is_in_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a/b"):
        put(folder / "log.jsonl")
    monkeypatch.chdir(tmp_path / "a/b")
    with pytest.raises(InputError, match="the folder you are in"):
        outputs.begin(Path(place), {}, True)
    assert len(tree(tmp_path)) == 3


RECORD = {"id": "a", "prompt": "p", "responses": [{"text": t, "scores": {"r": s}} for t, s in (("b", 1.0), ("c", 0.0))]}


@pytest.mark.parametrize(
    "words",
    [
        lambda at: ["sample", "--model", "tiny", "--prompts", at("data.jsonl"), "--output", at("mine.jsonl")],
        lambda at: ["score", "--config", at("score.yaml"), "--output", at("mine.jsonl")],
    ],
    ids=["sample", "score"],
)
def test_a_stage_leaves_a_file_of_other_hands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Callable[[Callable[[str], str]], list[str]]
) -> None:
    def at(name: str) -> str:
        return str(tmp_path / name)

    put(tmp_path / "data.jsonl", json.dumps(RECORD) + "\n")
    scorer = {"name": "v", "kind": "function", "function": "rankalign.scorers.builtin:vader"}
    settings = {"input": at("data.jsonl"), "output": at("mine.jsonl"), "scorers": [scorer]}
    put(tmp_path / "score.yaml", json.dumps(settings))
    mine = put(tmp_path / "mine.jsonl", "notes of years\n")
    assert main(words(at)) == 1
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert mine.read_text() == "notes of years\n"
    assert main([*words(at), "--overwrite"]) == 0
    assert json.loads(mine.read_text())["id"] == "a"
    assert main(words(at)) == 0


@pytest.mark.parametrize("method", ["rank", "ppo"])
def test_training_never_writes_over_its_start_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    from rankalign.models import load as models

    models.load_policy("tiny").save_pretrained(tmp_path / "model")
    models.load_tokenizer("tiny").save_pretrained(tmp_path / "model")
    data = put(tmp_path / "data.jsonl", json.dumps(RECORD) + "\n")
    words = ["train", "--method", method, "--data", str(data), "--use_cpu", "--max_steps", "1"]
    words += ["--reward", "rankalign.scorers.builtin:vader"] if method == "ppo" else ["--loss", "rrhf"]
    before = tree(tmp_path)
    for flags in ([], ["--overwrite"]):
        assert main([*words, "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "model"), *flags]) == 1
        assert "is what --model names" in capsys.readouterr().err
        assert tree(tmp_path) == before
    assert main([*words, "--model", "tiny", "--output_dir", str(tmp_path / "model"), "--overwrite"]) == 1
    assert "no run left" in capsys.readouterr().err
    assert tree(tmp_path) == before
