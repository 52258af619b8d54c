"""The journal: whole lines only, one writer, one configuration, nothing twice."""

from __future__ import annotations

import fcntl
import os
import random
from pathlib import Path

import pytest

from rankalign.errors import InputError
from rankalign.storage.journal import Journal, differences

HEADER = {"stage": "sample", "temperature": 0.7}
ITEMS = [((f"policy{i % 3}", f"id-{i}"), {"text": "line\n \u2028 é " * i, "n": i}) for i in range(20)]


def filled(path: Path) -> bytes:
    with Journal(path, HEADER) as journal:
        for start in range(0, 20, 5):
            journal.append(ITEMS[start : start + 5])
    return path.read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    with Journal(tmp_path / "j", HEADER) as journal:
        assert journal.done == dict(ITEMS)


def test_cut_at_any_byte_loses_the_torn_tail_only(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    rng = random.Random(7)
    for cut in [0, 1, *rng.sample(range(len(whole)), 60), len(whole)]:
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends) - 1  # less the header
        with Journal(path, HEADER) as journal:
            assert journal.done == dict(ITEMS[: max(kept, 0)])
            journal.append(ITEMS)
        assert path.read_bytes() == whole, f"cut at {cut}"


def test_a_key_is_stored_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.append([(("a", "1"), "first")])
        journal.append([(("a", "1"), "second"), (("a", "2"), "x")])
        assert journal.done == {("a", "1"): "first", ("a", "2"): "x"}
    assert (tmp_path / "j").read_bytes().count(b"\n") == 3


def test_damage_inside_is_an_error_with_its_line(tmp_path: Path) -> None:
    raw = bytearray(filled(tmp_path / "j"))
    third = [i for i, byte in enumerate(raw) if byte == 10][2]
    raw[third - 3] ^= 1
    (tmp_path / "j").write_bytes(raw)
    with pytest.raises(InputError, match=r"j:3: damaged line"):
        Journal(tmp_path / "j", HEADER)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    with pytest.raises(InputError, match=r"temperature: 0\.7 -> 0\.9.*--overwrite"):
        Journal(tmp_path / "j", {**HEADER, "temperature": 0.9})


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", HEADER), pytest.raises(InputError, match="another process is writing"):
        Journal(tmp_path / "j", HEADER)
    Journal(tmp_path / "j", HEADER).close()


def test_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        journal.append(ITEMS[:3])
        before = path.read_bytes()
        real = os.write

        def full(handle: int, block: bytes) -> int:
            real(handle, block[: len(block) // 2])  # some of it lands, as on a real disk
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(InputError, match="no space left on the disk; what was finished is safe"):
            journal.append(ITEMS[3:6])
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.append(ITEMS[3:6])
    with Journal(path, HEADER) as journal:
        assert journal.done == dict(ITEMS[:6])


def test_differences_name_paths() -> None:
    old = {"a": 1, "b": {"c": [1, 2]}, "same": None}
    new = {"a": 2, "b": {"c": [1, 3]}, "same": None, "d": "x"}
    assert differences(old, new) == ["a: 1 -> 2", "b.c[1]: 2 -> 3", 'd: null -> "x"']
    assert differences([1], [1, 2]) == [": [1] -> [1, 2]"]


def test_a_fresh_journal_takes_nothing_from_another_writer(tmp_path: Path) -> None:
    """--overwrite: what is there goes only once the lock is ours."""
    before = filled(tmp_path / "j")
    with Journal(tmp_path / "j", HEADER) as journal:
        with pytest.raises(InputError, match="another process is writing"):
            Journal(tmp_path / "j", {"other": 1}, fresh=True)
        assert (tmp_path / "j").read_bytes() == before
        assert len(journal.done) == 20
    with Journal(tmp_path / "j", {"other": 1}, fresh=True) as journal:
        assert journal.done == {}


def test_a_journal_that_its_owner_removed_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our opening and our locking it, its owner finished."""
    path, real = tmp_path / "j", fcntl.flock

    def late(handle: int, how: int) -> None:
        path.unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="has just finished it; run the same command again"):
        Journal(path, HEADER)


def test_a_journal_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/j: cannot be written"):
        Journal(tmp_path / "file" / "j", HEADER)


def test_every_batch_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "j", HEADER) as journal:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(len(journal.done)))
        journal.append(ITEMS[:3])
        journal.append(ITEMS[3:5])
    assert synced == [0, 3]
