"""Files that are never half-written: every way in which writing fails is one sentence, and the old file stays."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from rankalign.errors import InputError
from rankalign.storage import files
from rankalign.storage.files import atomic_writer, sha256_file, write_text


def test_a_place_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match=r"file/out\.txt: cannot be written: "):
        write_text(tmp_path / "file" / "out.txt", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: cannot be written: Is a directory"):
        write_text(tmp_path / "folder", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system")]
)
def test_a_folder_that_may_not_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(*args: object, **keywords: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(InputError, match=f"out: cannot be written: {reason}"):
        write_text(tmp_path / "out", "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence_and_the_device_stays(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/dev/full: cannot be written: No space left on device"):
        write_text("/dev/full", "x" * 100_000)
    assert not os.path.isfile("/dev/full")


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write_text(target, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_pipes_are_written_as_they_stand(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert not pipe.is_file()


def test_errors_of_the_block_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_writer(tmp_path / "out"):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError), atomic_writer(tmp_path / "out"):
        (tmp_path / "other").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_folder_has_a_digest_of_all_that_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"1")
    (tmp_path / "a").write_bytes(b"")
    one, empty = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"").hexdigest()
    assert sha256_file(tmp_path) == hashlib.sha256(f"{empty}  a\n{one}  b/x\n".encode()).hexdigest()
