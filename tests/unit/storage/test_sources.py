"""What is no text is called by its name, and one path means the same to everything that reads rows."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pytest

from rankalign.data import load as data
from rankalign.data.convert import Intake, convert
from rankalign.data.records import read
from rankalign.errors import InputError, RecordError
from rankalign.stages.generation import _prompts
from rankalign.storage.sources import parts, rows_of, sha256_of
from rankalign.storage.tables import write_folder, write_parquet

ROWS = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(4)]
TEXT = "\n".join(map(json.dumps, ROWS)) + "\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BYTES = [
    (TEXT.encode("utf-16"), "is UTF-16, not UTF-8"),
    (TEXT.encode("utf-16-le"), "looks like UTF-16, not UTF-8: `iconv -f UTF-16LE"),
    (TEXT.encode("utf-16-be"), "looks like UTF-16, not UTF-8: `iconv -f UTF-16BE"),
    (TEXT.encode("utf-32"), "is UTF-32"),
    (POINTER, "is a Git LFS pointer"),
    (pickle.dumps(ROWS), "is a Python pickle"),
    (b"BZh91AY", "is packed with bzip2"),
    (b"\xfd7zXZ\x00\x00", "is packed with xz"),
    (b"<!DOCTYPE html><html>", "is a web page"),
    (b"PAR1" + bytes(9), "is Parquet"),
    (b"   \n", "the file is empty"),
]


@pytest.mark.parametrize(("content", "what"), BYTES)
@pytest.mark.parametrize("packed", [False, True])
def test_bytes_that_are_no_rows_are_named(tmp_path: Path, content: bytes, what: str, packed: bool) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    for skip in (False, True):
        with pytest.raises(InputError, match=what):
            convert(path, tmp_path / "out.jsonl", skip_invalid=skip)
    with pytest.raises(InputError, match=what):
        list(read(path))


def test_an_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.jsonl", "w") as archive:
        archive.writestr("in.jsonl", TEXT)
    with pytest.raises(InputError, match="is a zip archive"):
        convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "p", "score": NaN}', "NaN is not a finite number"),
        ("{broken", "not valid JSON"),
        ("3", "expected a"),
    ],
)
def test_where_no_row_is_sound_the_first_error_is_said(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "in.jsonl").write_text(line + "\n")
    with pytest.raises(RecordError, match=rf"in\.jsonl:1: {what}"):
        convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_a_packed_file_needs_no_ending(tmp_path: Path) -> None:
    (tmp_path / "in.data").write_bytes(gzip.compress(TEXT.encode()))
    assert convert(tmp_path / "in.data", tmp_path / "out.jsonl")["written"] == 4


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, str]:
    """One data set in every form in which a path can name it."""
    (tmp_path / "a.jsonl").write_text(TEXT)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(TEXT.encode()))
    write_parquet(tmp_path / "d.parquet", ROWS)
    write_folder(tmp_path / "e", {"": ROWS})
    write_folder(tmp_path / "f", {"train": ROWS, "test": ROWS[:1]})
    for name in ("g", "h"):
        (tmp_path / name / "data").mkdir(parents=True)
    write_parquet(tmp_path / "g/data/part-0.parquet", ROWS[:3])
    write_parquet(tmp_path / "g/data/part-1.parquet", ROWS[3:])
    write_parquet(tmp_path / "h/data/train-0-of-2.parquet", ROWS[:3])
    write_parquet(tmp_path / "h/data/train-1-of-2.parquet", ROWS[3:])
    write_parquet(tmp_path / "h/data/test-0-of-1.parquet", ROWS[:1])
    names = ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet", "e", "f/train", "g", "h/data/train-*.parquet")
    return {name: str(tmp_path / name) for name in names}


def test_every_form_of_a_data_set_is_the_same(forms: dict[str, str]) -> None:
    for path in forms.values():
        assert [row for _, row in rows_of(path)] == ROWS
        assert [record.prompt for record in data.load(path)] == [row["prompt"] for row in ROWS]
        assert [record.prompt for record in _prompts(path, 2, Intake(False))] == ["0?", "1?"]
        assert len({record.id for record in data.load(path)}) == 4
        assert len(sha256_of(path)) == 64


@pytest.mark.parametrize("folder", ["f", "h"])
def test_several_splits_are_named_and_each_can_be_read(forms: dict[str, str], folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds several splits; name one: "):
        data.load(tmp_path / folder)
    sizes = sorted(sum(1 for _ in rows_of(part)) for part in parts(tmp_path / folder))
    assert sizes == [1, 4]


def test_an_error_names_the_shard(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/part-0.jsonl").write_text(TEXT)
    (tmp_path / "set/part-1.jsonl").write_text('{"prompt": "p", "chosen": "a"}\n')
    with pytest.raises(RecordError, match=r"part-1\.jsonl:1: rejected: is missing"):
        list(data.load(tmp_path / "set"))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    for path, what in (
        ("none*.jsonl", "no file has such a name"),
        ("none.jsonl", "no such file"),
        (".", "without data"),
    ):
        with pytest.raises(InputError, match=what):
            list(rows_of(tmp_path / path))
