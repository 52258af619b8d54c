"""Parquet files and `datasets` folders: they say what JSON Lines say, row for row, and refuse what those refuse."""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankalign.data import load as data
from rankalign.data.convert import Intake, convert
from rankalign.data.mixing import Mixture
from rankalign.errors import InputError, RecordError
from rankalign.storage import tables as arrow
from rankalign.storage.jsonl import read_rows, write_rows
from rankalign.storage.tables import read_table, write_folder, write_parquet

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PAIR = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "No."}]}
RRHF = [{"query": "q", "responses": ["a", "b"], "scores": [1, 2.5]}, {"query": "r", "responses": ["c"] * 2}]


def fail(error: RecordError) -> None:
    raise error


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_table(path, fail)]


def refusals(path: Path) -> list[tuple[int, str, str]]:
    errors: list[RecordError] = []
    list(read_table(path, errors.append))
    return [(error.line, error.field, error.reason) for error in errors]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
ROWS = st.lists(st.dictionaries(st.sampled_from(["id", "prompt", "meta"]), VALUES, min_size=1), min_size=1, max_size=5)


def kinds(value: Any) -> Any:
    """A value with its types, so that 1 and True are not the same."""
    if isinstance(value, list):
        return [kinds(element) for element in value]
    if isinstance(value, dict):
        return {key: kinds(element) for key, element in value.items()}
    return (isinstance(value, bool), value)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_any_rows_come_back_from_parquet(rows: list[dict[str, Any]], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(arrow, "BATCH", batch)
        path = Path(folder) / "x.parquet"
        assert write_parquet(path, rows) == len(rows)
        assert [kinds(row) for row in rows_of(path)] == [kinds(row) for row in rows]


def test_any_rows_come_back_from_a_folder(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": {"x": None}}, {"a": 2.5, "b": {}}, {"a": 3, "c": [None, "t"]}, {"a": 4, "b": None}]
    assert write_folder(tmp_path / "set", {"": rows}) == {"": 4}
    assert rows_of(tmp_path / "set") == rows
    saved = datasets.load_from_disk(str(tmp_path / "set"))
    assert saved["a"][:] == [1, 2.5, 3, 4]
    assert saved.features["b"] == datasets.Json()


def test_plain_columns_keep_the_types_that_other_tools_expect(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [PAIR | {"margin": 1}, PAIR | {"margin": 0.5}])
    schema = pq.read_schema(tmp_path / "x.parquet")
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    assert [schema.field(name).type for name in ("prompt", "chosen", "rejected")] == [message] * 3
    assert schema.field("margin").type == pa.float64()


# --- convert and train -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.parquet", "folder", "folder/"])
def test_convert_there_and_back(tmp_path: Path, name: str) -> None:
    rows = [PAIR | {"id": "a"}, PAIR | {"id": "b", "margin": 0.5}]
    write_rows(tmp_path / "in.jsonl", rows)
    target = f"{tmp_path}/{name}"
    there = convert(tmp_path / "in.jsonl", target, "trl", "trl")
    back = convert(target, tmp_path / "back.jsonl", "trl", "trl")
    assert (there["written"], back["read"], back["written"], back["lost"]) == (2, 2, 2, {})
    assert [row for _, row in read_rows(tmp_path / "back.jsonl")] == rows
    assert [record.id for record in data.load(target)] == ["a", "b"]


def test_records_of_ours_come_back_whole(tmp_path: Path) -> None:
    response = {"text": "t", "policy": "p", "finished": True}
    rows = [
        {"id": "1", "prompt": "p", "responses": [response | {"scores": {"rm": 1.5}}], "meta": {"x": [1, "y"]}},
        {"id": "2", "prompt": [USER], "responses": [response | {"scores": {"judge": None}, "count": 2}]},
    ]
    write_rows(tmp_path / "in.jsonl", rows)
    convert(tmp_path / "in.jsonl", tmp_path / "x.parquet")
    convert(tmp_path / "x.parquet", tmp_path / "back.jsonl")
    assert [row for _, row in read_rows(tmp_path / "back.jsonl")] == rows


def test_a_foreign_table_reads_like_its_json_lines(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"instruction": "Add.", "input": "1", "output": "2"}] * 3), tmp_path / "x.parquet"
    )
    ids = [record.id for record in data.load(tmp_path / "x.parquet")]
    assert ids == ["x-000001", "x-000002", "x-000003"]


def test_a_dataset_dict_gives_all_splits_to_convert_and_none_to_training(tmp_path: Path) -> None:
    whole = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list([PAIR | {"source": name}] * count)
            for name, count in (("train", 3), ("test", 2))
        }
    )
    whole.save_to_disk(tmp_path / "set")
    assert convert(tmp_path / "set", tmp_path / "out.jsonl")["written"] == 5
    rows = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [row["id"] for row in rows] == [f"train-00000{i}" for i in (1, 2, 3)] + ["test-000001", "test-000002"]
    with pytest.raises(InputError, match=r"holds several splits; name one: .*set/train, .*set/test"):
        data.load(tmp_path / "set")
    assert len(list(data.load(tmp_path / "set" / "test"))) == 2
    datasets.DatasetDict({"train": whole["train"]}).save_to_disk(tmp_path / "one")
    assert len(list(data.load(tmp_path / "one"))) == 3


def test_a_held_out_part_is_a_split_of_the_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [PAIR | {"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(10)])
    report = convert(tmp_path / "in.jsonl", tmp_path / "set", "trl", "trl", mixture=Mixture(test_size=0.3))
    assert (report["written"], report["written_test"]) == (7, 3)
    saved = datasets.load_from_disk(str(tmp_path / "set"))
    assert {name: split.num_rows for name, split in saved.items()} == {"train": 7, "test": 3}


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [PAIR])
    convert(tmp_path / "in.jsonl", tmp_path / "set")
    with pytest.raises(InputError, match="is there already"):
        convert(tmp_path / "in.jsonl", tmp_path / "set")
    assert len(list(data.load(tmp_path / "set"))) == 1


def test_tables_are_read_a_batch_at_a_time(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ({"prompt": str(n)} for n in range(3 * arrow.BATCH)))
    taken = read_table(tmp_path / "x.parquet", fail)
    assert next(taken) == (1, {"prompt": "0"})
    before = pa.total_allocated_bytes()
    assert sum(1 for _ in taken) == 3 * arrow.BATCH - 1
    assert pa.total_allocated_bytes() <= before


# --- what is refused ---------------------------------------------------------------------------------------------


def test_cells_that_json_refuses_are_refused_by_row_and_field(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [
        {"query": "a", "responses": ["a", "b"], "scores": [1.0, 2.0]},
        {"query": "b", "responses": ["a", "b"], "scores": [1.0, nan]},
        {"query": "c", "responses": ["a", None], "scores": [1.0, 2.0]},
        {"query": None, "responses": ["a", "b"], "scores": [1.0, 2.0]},
        {"query": "d", "responses": ["a", "b"], "scores": [None, 2.0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    path = str(tmp_path / "x.parquet")
    with pytest.raises(RecordError, match=r"x\.parquet:2: scores\[1\]: is not a finite number"):
        convert(path, tmp_path / "out.jsonl", "rrhf")
    assert not (tmp_path / "out.jsonl").exists()
    report = convert(path, tmp_path / "out.jsonl", "rrhf", skip_invalid=True)
    assert (report["read"], report["written"], report["skipped"]) == (5, 1, 4)
    assert [(e["line"], e["field"]) for e in report["errors"]] == [
        (2, "scores[1]"),
        (3, "responses[1]"),
        (4, "query"),
        (5, "scores[0]"),
    ]


def test_dates_become_text_and_bytes_are_refused(tmp_path: Path) -> None:
    rows = [{"a": datetime.datetime(2023, 4, 5, 6), "b": b"x"}, {"a": datetime.datetime(2023, 4, 5, 7), "b": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert refusals(tmp_path / "x.parquet") == [(1, "b", "holds bytes, for which JSON has no form")]
    (row,) = (row for _, row in read_table(tmp_path / "x.parquet", lambda error: None))
    assert row == {"a": "2023-04-05T07:00:00", "b": None}


def test_broken_json_in_a_cell_is_refused(tmp_path: Path) -> None:
    cells = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1, "a": 2}', '{"a": 1}']))
    pq.write_table(pa.table({"meta": cells}), tmp_path / "x.parquet")
    assert refusals(tmp_path / "x.parquet") == [(1, "meta", "the key 'a' stands twice in one object")]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_damaged_parquet_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet: cannot be read: "):
        rows_of(tmp_path / "x.parquet")


def test_a_cut_parquet_is_one_sentence(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [PAIR] * 100)
    whole = (tmp_path / "x.parquet").read_bytes()
    for spoilt in (whole[:-20], whole[:50] + bytes(40) + whole[90:]):
        (tmp_path / "x.parquet").write_bytes(spoilt)
        with pytest.raises(InputError, match=r"x\.parquet: "):
            rows_of(tmp_path / "x.parquet")


def test_a_folder_that_is_no_data_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file, or no folder written by `datasets`"):
        rows_of(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        rows_of(tmp_path / "none.parquet")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": 3}))
    with pytest.raises(InputError, match="does not list the splits"):
        data.load(tmp_path)


def test_no_rows_make_an_empty_table(tmp_path: Path) -> None:
    assert write_parquet(tmp_path / "x.parquet", []) == 0
    assert rows_of(tmp_path / "x.parquet") == []
    with pytest.raises(InputError, match="reads no folder without rows"):
        write_folder(tmp_path / "set", {"": []})
    assert not (tmp_path / "set").exists()


def test_columns_that_are_missing_at_random_are_not_taken_for_nulls(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", RRHF)
    intake = Intake(skip_invalid=True)
    assert len(list(data.load(tmp_path / "x.parquet", "rrhf", intake))) == 1
    assert [error.reason for error in intake.errors] == ["is missing (found: query, responses)"]


@pytest.mark.parametrize("place", ["plain", "list", "object"])
def test_large_whole_numbers_among_decimals_come_back_exactly(tmp_path: Path, place: str) -> None:
    """2^53 + 1 has no double, and the batches differ: the first holds it, the second a decimal."""
    put = {"plain": lambda v: v, "list": lambda v: [v], "object": lambda v: {"v": v}}[place]
    numbers = [2**53 + 1] * arrow.BATCH + [0.5]
    for order in (numbers, numbers[::-1]):
        rows = [{"n": put(number), "small": 1 if index else 0.25} for index, number in enumerate(order)]
        write_parquet(tmp_path / "x.parquet", rows)
        assert [row for _, row in read_table(tmp_path / "x.parquet")] == rows
        assert str(pq.read_schema(tmp_path / "x.parquet").field("small").type) == "double"


def test_a_null_that_arrow_filled_in_is_no_argument_of_a_call(tmp_path: Path) -> None:
    def row(name: str, **arguments: Any) -> dict[str, Any]:
        tools = [{"name": name, "parameters": {key: {"type": "string"} for key in arguments}}]
        return {"chosen": [{"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}], "tools": tools}

    rows = [row("weather", city="Oslo"), row("time", zone="CET")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert pq.read_table(tmp_path / "in.parquet").to_pylist() != rows
    assert [found for _, found in read_table(tmp_path / "in.parquet")] == rows
