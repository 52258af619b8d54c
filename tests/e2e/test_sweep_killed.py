"""A sweep in processes of its own, ended from outside; tests/unit/recipes/test_sweep.py has all that needs none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankalign.storage.jsonl import write_rows

WORDS = "--model tiny --loss dpo --max_steps 3 --beta 0.1,0.2,0.3 --output_dir sweep --data pairs.jsonl --save_steps 1"


def start(folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "RANKALIGN_CACHE": str(folder / "cache"), "RANKALIGN_TOKEN_CACHE": str(folder / "tokens")}
    command = [sys.executable, "-m", "rankalign", "sweep", *WORDS.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_finished_is_not_trained_again(how: signal.Signals, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}"} for i in range(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    first = start(tmp_path)
    while not (done := [*tmp_path.glob("sweep/*/manifest.json")]):
        assert first.poll() is None, first.communicate()[1][-2000:]
        time.sleep(0.1)
    first.send_signal(how)
    said = first.communicate(timeout=300)[1]
    assert first.returncode == (130 if how == signal.SIGTERM else -signal.SIGKILL), said[-2000:]
    if how == signal.SIGTERM:
        assert "the same command goes on from there" in said
    stamps = {path: path.stat().st_mtime_ns for path in done}
    second = start(tmp_path)
    said = second.communicate(timeout=400)[1]
    assert second.returncode == 0, said[-2000:]
    assert "is finished already: nothing to do" in said
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["finished"] == 3
    assert (tmp_path / "sweep" / "sweep.md").is_file()
