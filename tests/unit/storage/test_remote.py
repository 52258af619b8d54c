"""Addresses that fsspec opens, here those of its memory and of files: read like paths, written whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from rankalign.data.convert import convert
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.storage.sources import is_there, sha256_of

RECORDS = [CandidateSet(f"id-{n}", f"asked {n}?", [Response(f"said {n}")]) for n in range(9)]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_what_is_written_to_an_address_is_read_from_it(
    ending: str, tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    write(tmp_path / "in.jsonl", RECORDS)
    assert convert(tmp_path / "in.jsonl", f"memory://bucket/out{ending}")["written"] == 9
    assert list(load(f"memory://bucket/out{ending}")) == RECORDS
    convert(f"memory://bucket/out{ending}", tmp_path / "back.jsonl")
    assert (tmp_path / "back.jsonl").read_bytes() == (tmp_path / "in.jsonl").read_bytes()
    convert(tmp_path / "in.jsonl", tmp_path / f"local{ending}")
    assert memory.cat(f"/bucket/out{ending}") == (tmp_path / f"local{ending}").read_bytes()


def test_folders_and_patterns_behind_an_address(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    write(tmp_path / "in.jsonl", RECORDS)
    convert(tmp_path / "in.jsonl", tmp_path / "many.jsonl", output_shards=3)
    for path in (tmp_path / "many.jsonl").iterdir():
        memory.pipe(f"/bucket/many/{path.name}", path.read_bytes())
    for address in ("memory://bucket/many", "memory://bucket/many/part-*.jsonl", f"file://{tmp_path}/many.jsonl"):
        assert list(load(address)) == RECORDS
        assert is_there(address)
    memory.pipe("/bucket/many/part-00003-of-00003.jsonl", b"{")
    with pytest.raises(InputError, match=r"memory://.*part-00003-of-00003\.jsonl:1: not valid JSON"):
        list(load("memory://bucket/many"))


def test_what_cannot_be_is_said(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    write(tmp_path / "in.jsonl", RECORDS)
    for address, said in (
        ("memory://bucket/none.jsonl", "no such file"),
        ("memory://bucket/*.jsonl", "no file has such a name"),
        ("nowhere://x.jsonl", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=said):
            list(load(address))
    with pytest.raises(InputError, match="read from this machine"):
        sha256_of("memory://bucket/in.jsonl")
    with pytest.raises(InputError, match="one file can be written to an address"):
        convert(tmp_path / "in.jsonl", "memory://bucket/out.jsonl", output_shards=2)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "in.jsonl").read_text() + "{")
    with pytest.raises(InputError, match="not valid JSON"):
        convert(tmp_path / "bad.jsonl", "memory://bucket/bad.jsonl")
    assert not memory.exists("/bucket/bad.jsonl")
