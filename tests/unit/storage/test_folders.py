"""What a killed process leaves half-made goes, what another one is making stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
