"""kill -9 during a long `score`, in one process and in two: the file of an undisturbed run, byte for byte."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankalign.data.records import CandidateSet, Response, write

KILLS, RECORDS = 10, 100_000


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--num_proc", "2")], ids=["one", "two"])
def test_a_long_score_killed_at_ten_moments(more: tuple[str, ...], tmp_path: Path) -> None:
    draw = random.Random(9)
    records = (CandidateSet(f"id-{n}", f"asked {n}?", [Response("said " * (n % 9))]) for n in range(RECORDS))
    write(tmp_path / "in.jsonl", records)
    words = [sys.executable, "-m", "rankalign", "score", "--input", f"{tmp_path}/in.jsonl", "--function"]
    words += ["rankalign.scorers.builtin:words", "--output"]
    began = time.monotonic()
    subprocess.run([*words, f"{tmp_path}/whole.jsonl"], check=True, capture_output=True)
    whole, journal = time.monotonic() - began, tmp_path / "out.jsonl.journal"
    midway = 0
    for _ in range(KILLS):
        process = subprocess.Popen([*words, f"{tmp_path}/out.jsonl", *more], stderr=subprocess.DEVNULL)
        before = size(journal)
        while process.poll() is None and size(journal) <= max(before, 1000):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.03) * whole)
        process.kill()
        process.wait()
        midway += size(journal) > 1000
    assert midway >= 3
    subprocess.run([*words, f"{tmp_path}/out.jsonl", *more], check=True, capture_output=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()
