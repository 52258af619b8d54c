"""What a killed process leaves half-made goes, what another one is making stays."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rankalign.storage.folders import new_folder, remove_strays

KILLED = """
import os, signal, sys
from rankalign.storage.folders import new_folder
with new_folder(sys.argv[1]) as fresh:
    (fresh / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_strays_of_a_kill_go_and_work_in_progress_stays(tmp_path: Path) -> None:
    for number in (5, 6):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / f"checkpoint-{number}")], env=dict(os.environ))
    left = list(tmp_path.glob(".checkpoint-*.part-*"))
    assert len(left) == 2
    with new_folder(tmp_path / "checkpoint-7") as fresh:
        remove_strays(tmp_path, "checkpoint-*")
        assert list(tmp_path.glob(".*")) == [fresh]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_a_new_try_removes_what_the_last_one_left(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "delta")], env=dict(os.environ))
    with new_folder(tmp_path / "delta") as fresh:
        assert list(tmp_path.iterdir()) == [fresh]
    assert list(tmp_path.iterdir()) == [tmp_path / "delta"]


def test_a_folder_that_is_taken_for_a_stray_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes strays between the making of a folder and the lock on it, three times in a row."""
    make, made = tempfile.mkdtemp, list[str]()

    def taken(**where: Any) -> str:
        made.append(make(**where))
        if len(made) <= 3:
            remove_strays(tmp_path, "delta")
            assert not Path(made[-1]).exists()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with new_folder(tmp_path / "delta") as fresh:
        (fresh / "x").write_text("whole")
        remove_strays(tmp_path, "delta")
    assert (tmp_path / "delta/x").read_text() == "whole"
    assert len(made) == 4


def test_who_waits_for_the_lock_of_a_remover_makes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remover was quicker: it has opened and locked the folder when its maker asks for the lock."""
    lock, asked = fcntl.flock, list[int]()

    def slow(handle: int, how: int) -> None:
        if not asked:
            asked.append(handle)
            remove_strays(tmp_path, "delta")
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with new_folder(tmp_path / "delta") as fresh:
        (fresh / "x").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
