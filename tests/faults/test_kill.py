"""kill -9 at random moments: nothing lost, nothing twice, and the file of an uninterrupted run, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.records import CandidateSet, read, write

PROMPTS = 40
POLICIES = """
policies:
  - {name: warm, model: tiny, n: 2, temperature: 1.0, max_new_tokens: 24}
  - {name: greedy, model: tiny, n: 1, temperature: 0, max_new_tokens: 24}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, settings, and the output of a run that nobody disturbed."""
    where = tmp_path_factory.mktemp("kill")
    rng = random.Random(1)
    prompts = [CandidateSet(f"p{i}", "word " * rng.randint(1, 30)) for i in range(PROMPTS)]
    write(where / "prompts.jsonl", prompts)
    (where / "sample.yaml").write_text(f"prompts: {where}/prompts.jsonl\noutput: {where}/whole.jsonl{POLICIES}")
    assert main(["sample", "--config", str(where / "sample.yaml")]) == 0
    return where


def journal_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def run_and_kill(command: list[str], journal: Path, after_bytes: int) -> bool:
    """Start ``command``, kill it once its journal has grown past ``after_bytes``; False if it ended before."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and journal_size(journal) <= after_bytes:
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_sample_survives_five_kills(folder: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    output = folder / f"cut-{seed}.jsonl"
    journal = output.with_name(output.name + ".journal")
    command = [sys.executable, "-m", "rankalign", "sample", "--config", str(folder / "sample.yaml")]
    command += ["--output", str(output)]
    kills = 0
    for _ in range(5):
        kills += run_and_kill(command, journal, journal_size(journal) + rng.randrange(4000))
        assert kills == 0 or output.exists() or journal.exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert kills > 0, "no run lived long enough to be killed"
    assert output.read_bytes() == (folder / "whole.jsonl").read_bytes(), f"seed {seed}"
    assert not journal.exists()
    assert [record.id for record in read(output)] == [f"p{i}" for i in range(PROMPTS)]


def test_score_survives_the_loss_of_any_tail(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal of a scoring run, cut at many bytes, always leads to the same file."""
    from rankalign import generation

    scorer = tmp_path / "scorer.py"
    scorer.write_text("def length(samples):\n    return [float(len(s)) for s in samples]\n")
    flags = ["--input", str(folder / "whole.jsonl"), "--name", "length", "--function", f"{scorer}:length"]
    monkeypatch.setattr(generation, "SCORE_BATCH", 4)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # keep the journal to cut it
    assert main(["score", *flags, "--output", str(tmp_path / "whole.jsonl")]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(generation, "SCORE_BATCH", 4)
    journal = (tmp_path / "whole.jsonl.journal").read_bytes()
    rng = random.Random(5)
    for cut in rng.sample(range(len(journal)), 12):
        output = tmp_path / f"cut{cut}.jsonl"
        output.with_name(output.name + ".journal").write_bytes(journal[:cut])
        assert main(["score", *flags, "--output", str(output)]) == 0
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes(), cut
