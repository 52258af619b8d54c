"""A disk that is full or may not be written: one clear line, nothing half-written, and the run goes on afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.cli import main
from tests.faults.children import finish, start


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        (200, "log.jsonl.journal: File too large; what was finished is safe"),  # not even the journal's header fits
        (8_000, "log.jsonl.journal: File too large; what was finished is safe"),
        (0.9, "log.jsonl: cannot be written: File too large; all that was computed is safe"),
    ],
)
def test_a_full_disk(folder: Path, tmp_path: Path, largest: float, message: str) -> None:
    """Files may not grow beyond a limit: too small for the journal, or for the output (a share of it) alone."""
    whole = (folder / "sampled.jsonl").read_bytes()
    limit = int(largest if largest > 1 else largest * len(whole))
    output, log = tmp_path / "log.jsonl", tmp_path / "log"
    words = ["sample", "--config", f"{folder}/sample.yaml", "--output", str(output)]
    assert finish(words, log, limit) == 1
    shown = log.read_text()
    assert message in shown
    assert "run the same command again" in shown
    assert "Traceback" not in shown
    assert {path.name for path in tmp_path.iterdir()} <= {"log", "log.jsonl.journal"}
    assert finish(words, log) == 0
    assert output.read_bytes() == whole


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["sample", "--config", f"{folder}/sample.yaml", "--output", f"{tmp_path}/file/out.jsonl"]) == 1
    assert "file/out.jsonl" in capsys.readouterr().err


def test_two_writers(folder: Path, tmp_path: Path) -> None:
    """Started together, one does the work; the other is told so, or finds it done. --overwrite takes nothing away."""
    output = tmp_path / "out.jsonl"
    words = ["sample", "--config", f"{folder}/sample.yaml", "--output", str(output), "--overwrite"]
    processes = [start(words, tmp_path / f"log{i}") for i in range(3)]
    for process in processes:
        process.join()
    codes = sorted(process.exitcode or 0 for process in processes)
    assert codes[0] == 0
    assert codes[-1] in (0, 1)
    for index, process in enumerate(processes):
        if process.exitcode:
            assert "another process" in (tmp_path / f"log{index}").read_text()
    assert output.read_bytes() == (folder / "sampled.jsonl").read_bytes()
