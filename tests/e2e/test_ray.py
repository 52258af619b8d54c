"""The runner ray on a cluster of two workers on this machine: the records of one process, on the loopback alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.engines import hf

# Not importorskip: our runner has to be the one that imports Ray, which reads its settings then.
pytestmark = [
    pytest.mark.slow,  # actors import torch anew: half a minute on an idle machine
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed"),
]
LISTENING = "0A"


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prompts and settings; Ray goes down at the end."""
    where = tmp_path_factory.mktemp("ray")
    rng = random.Random(3)
    sets = [CandidateSet(f"p{i}", "word " * rng.randint(1, 30), [Response(f"é\u2028{i}", "me")]) for i in range(24)]
    write(where / "prompts.jsonl", sets)
    (where / "sample.yaml").write_text(
        f"prompts: {where}/prompts.jsonl\noutput: {where}/out.jsonl\n"
        "policies: [{name: warm, model: tiny, n: 3, max_new_tokens: 10}]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        yield where
    import ray

    ray.shutdown()


def children(parent: int) -> set[int]:
    """All descendants of a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, grown = {parent}, set[int]()
    while found != grown:
        found, grown = found | {pid for pid, above in parents.items() if above in found}, found
    return found


def listening(pids: set[int]) -> dict[str, str]:
    """Sockets on which processes listen: address by inode."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(handle).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: row[1].partition(":")[0] for row in rows if row[3] == LISTENING and row[9] in inodes}


def test_two_workers_write_what_one_process_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_ROWS", 12)  # in the driver alone: it cuts the batches, for one process and for Ray
    ray_flags = ["--runner", "ray", "--workers", "2"]
    sample = ["sample", "--config", f"{folder}/sample.yaml"]
    assert main([*sample, "--output", f"{folder}/one.jsonl"]) == 0
    assert main([*sample, "--output", f"{folder}/two.jsonl", *ray_flags]) == 0
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()

    addresses = set(listening(children(os.getpid())).values())
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}, "Ray listens beyond the loopback"
    assert addresses

    score = ["score", "--input", f"{folder}/one.jsonl", "--reward_model", "tiny-rm"]
    assert main([*score, "--output", f"{folder}/rm1.jsonl"]) == 0
    assert main([*score, "--output", f"{folder}/rm2.jsonl", *ray_flags]) == 0
    assert (folder / "rm2.jsonl").read_bytes() == (folder / "rm1.jsonl").read_bytes()


def test_a_users_mistake_crosses_the_actors_as_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "scorer.py").write_text("def bad(samples):\n    raise ValueError('no luck')\n")
    flags = ["--function", f"{folder}/scorer.py:bad", "--runner", "ray", "--workers", "2"]
    assert main(["score", "--input", f"{folder}/prompts.jsonl", "--output", f"{folder}/bad.jsonl", *flags]) == 1
    assert "scorer.py:bad raised ValueError: no luck" in capsys.readouterr().err
    assert not (folder / "bad.jsonl").exists()
