"""log.jsonl is the trainer's history at every moment, and is not written anew for every line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankalign.storage.jsonl import dumps
from rankalign.training import run
from rankalign.training.run import JsonlLog


def state(history: list[dict[str, Any]]) -> Any:
    return SimpleNamespace(is_world_process_zero=True, log_history=history, global_step=len(history), max_steps=9)


def test_lines_are_appended_and_a_resume_begins_at_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[int] = []
    real = run.write_text
    monkeypatch.setattr(run, "write_text", lambda path, text: whole.append(len(text)) or real(path, text))
    args, path, history = SimpleNamespace(disable_tqdm=False), tmp_path / "log.jsonl", list[dict[str, Any]]()
    log = JsonlLog(path)
    for step in range(5):
        history.append({"loss": step / 3, "step": step, "nan": float("nan")})
        log.on_log(args, state(history), None)
        assert path.read_text() == "".join(dumps({**line, "nan": None}) + "\n" for line in history)
    assert len(whole) == 1
    # A process that was killed while it wrote, and one that goes on from step 2.
    path.write_bytes(path.read_bytes()[:-7])
    resumed = [*history[:2], {"loss": 9.0, "step": 2}]
    JsonlLog(path).on_log(args, state(resumed), None)
    assert [line.partition('"step":')[2].lstrip()[0] for line in path.read_text().splitlines()] == ["0", "1", "2"]
