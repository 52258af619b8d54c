"""References just before the update that needs them: the values of before, and for updates that run alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.storage.jsonl import read_rows
from rankalign.training import reference_table
from rankalign.training.ahead import StartModel
from rankalign.training.arguments import parse_settings
from rankalign.training.reference_table import ReferenceTable
from rankalign.training.run import train
from rankalign.training.settings import ModelSettings


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = {name: models.resolve(name) for name in ("tiny",)}
    monkeypatch.setattr(models, "resolve", lambda name: made.get(name, name))
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")
    sets = [CandidateSet(f"p{i}", f"q{i}?", [_said(f"a{i}" * (j + 1), j) for j in range(3)]) for i in range(8)]
    write(tmp_path / "data.jsonl", sets)
    write(tmp_path / "held.jsonl", [CandidateSet("p0", "held?", [_said("b", 0), _said("bb", 1)])])
    return tmp_path / "data.jsonl"


def _said(text: str, score: float) -> Response:
    return Response(text, scores={"j": float(score)})


def run(data: Path, name: str, **more: Any) -> tuple[list[dict[str, Any]], bytes]:
    """The log, less what a clock says, and the bytes of the weights."""
    output = data.parent / name
    fixed = {"model": "tiny", "data": str(data), "output_dir": str(output), "use_cpu": True, "disable_tqdm": True}
    fixed |= {"loss": "dpo", "save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    train(parse_settings({**fixed, "learning_rate": 1e-3, "logging_steps": 1, **more}))
    lines = [row for _, row in read_rows(output / "log.jsonl")]
    weights = next(output.glob("*model.safetensors")).read_bytes()
    timed = ("runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines], weights


@pytest.mark.parametrize("lora", [False, True])
def test_ahead_equals_before_to_the_bit(lora: bool, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"use_lora": lora, "num_train_epochs": 2, "eval_data": str(data.parent / "held.jsonl")}
    more |= {"eval_strategy": "epoch"}
    before = run(data, "before", references="before", **more)
    assert "reference: 26 responses computed" in capsys.readouterr().err
    (data.parent / "cache" / "reference").rename(data.parent / "cache" / "kept")
    ahead = run(data, "ahead", references="ahead", **more)
    told = capsys.readouterr().err
    assert ahead == before
    assert "reference: 26 responses computed" in told
    # The start model is below a fresh adapter; else a second copy is loaded, at the second update and after it is given
    # back once more for what is held out.
    assert told.count("a second copy of the start model is loaded") == (0 if lora else 2)


def test_only_updates_that_run_have_a_reference(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, "one", max_steps=1)
    told = capsys.readouterr().err
    assert "reference: 6 responses computed, 0 from" in told  # 2 prompts of 3
    assert "second copy" not in told
    run(data, "two", max_steps=2)
    told = capsys.readouterr().err
    assert "reference: 6 responses computed, 6 stored ones computed again as a check, 6 from" in told
    assert "a second copy of the start model is loaded" in told


def test_an_adapter_that_trains_on_has_itself_as_its_reference(tmp_path: Path, data: Path) -> None:
    run(data, "adapter", use_lora=True, max_steps=4, learning_rate=0.1)
    adapter = str(data.parent / "adapter")
    start = StartModel(ModelSettings(model=adapter, use_lora=True), "float32")
    assert not start.below_adapter
    first, _ = run(data, "on", model=adapter, use_lora=True, max_steps=3, references="before")
    (data.parent / "cache" / "reference").rename(data.parent / "cache" / "kept")
    again, _ = run(data, "on-ahead", model=adapter, use_lora=True, max_steps=3, references="ahead")
    assert again == first
    assert first[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the reference is the adapter, not its base


def test_ahead_is_refused_where_weights_are_sharded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankalign.training import inputs

    config = parse_settings({"model": "tiny", "loss": "dpo", "use_cpu": True, "references": "ahead"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="needs whole weights"):
        inputs.references_ahead(config, models.load_policy("tiny", dtype="float32"), "tree")
    config.references = "auto"
    assert inputs.references_ahead(config, models.load_policy("tiny", dtype="float32"), "tree") is None


# --- the table ---------------------------------------------------------------------------------------------------


def key(number: int, head: int = 0) -> bytes:
    """Keys of which many share their first eight bytes."""
    return struct.pack("<QQQQ", head, number, 0, number * 7)


def test_rows_are_found_after_and_before_they_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ReferenceTable(tmp_path / "a.table")
    sums = {key(i, head=i % 3): (-i / 7,) for i in range(50)}
    table.add(dict(list(sums.items())[:30]))
    other = ReferenceTable(tmp_path / "a.table")  # as another process has it
    other.add(dict(list(sums.items())[30:]))
    assert len(other) == 50
    assert other.find([*sums, key(99)]) == [*sums.values(), None]
    assert table.find([key(40, head=1)]) == [None]  # added by another since it was opened
    monkeypatch.setattr(reference_table, "MAPPED_AT", 1)
    table.add({key(99): (1.0,)})
    assert table.find([*sums, key(99)]) == [*sums.values(), (1.0,)]
    assert (tmp_path / "a.table").stat().st_size == 51 * table.row.itemsize == 51 * 48


def test_half_a_row_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.table"
    ReferenceTable(path).add({key(1): (-1.0,), key(2): (-2.0,)})
    with open(path, "ab") as out:
        out.write(key(3) + b"\0\0")  # a kill in the middle of a row
    table = ReferenceTable(path)
    assert table.find([key(1), key(2), key(3)]) == [(-1.0,), (-2.0,), None]
    table.add({key(4): (-4.0,)})
    assert ReferenceTable(path).find([key(1), key(3), key(4)]) == [(-1.0,), None, (-4.0,)]


@pytest.mark.parametrize("place", [5, 20, 33, 45])
def test_a_row_with_other_bytes_is_no_row_and_can_be_written_again(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.table"
    ReferenceTable(path).add({key(1): (-1.0,), key(2): (-2.0,)})
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    table = ReferenceTable(path)
    assert table.find([key(1), key(2)]) == [None, (-2.0,)]
    table.add({key(1): (-1.5,)})
    assert ReferenceTable(path).find([key(1), key(2)]) == [(-1.5,), (-2.0,)]


def test_sums_come_back_to_the_bit(tmp_path: Path) -> None:
    values = (torch.randn(20, dtype=torch.float64) * 1e-9).tolist()
    ReferenceTable(tmp_path / "a.table").add({key(i): (value,) for i, value in enumerate(values)})
    assert ReferenceTable(tmp_path / "a.table").find([key(i) for i in range(20)]) == [(value,) for value in values]


def test_a_table_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        ReferenceTable(tmp_path / "file" / "a.table").add({key(1): (0.0,)})


def test_a_table_of_several_numbers_a_key(tmp_path: Path) -> None:
    rows = {key(i): tuple(torch.randn(8, dtype=torch.float64).tolist()) for i in range(5)}
    ReferenceTable(tmp_path / "a.table", 8).add(rows)
    assert ReferenceTable(tmp_path / "a.table", 8).find([*rows, key(9)]) == [*rows.values(), None]
    assert (tmp_path / "a.table").stat().st_size == 5 * 104
