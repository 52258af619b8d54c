"""kill -9 at random moments: nothing lost, nothing twice, and the file of an uninterrupted run, byte for byte."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import read, write
from rankalign.stages import generation
from tests.faults.children import PROMPTS, finish, killed, start
from tests.faults.server import FaultServer

STAGES = ("sample", "reward_model", "judge")
AXES = ("helpfulness", "relevance", "accuracy", "clarity", "safety")


def grades(request: dict[str, Any]) -> str:
    """What the judge says: grades that depend on what it is shown, and one time in six nothing that can be read."""
    digest = hashlib.sha256(json.dumps(request["messages"]).encode()).digest()
    if digest[0] % 6 == 0:
        return "I would rather not say."
    return "Verdict: " + ", ".join(f"{axis}={1 + byte % 5}" for axis, byte in zip(AXES, digest[1:], strict=False))


def judging(folder: Path, url: str) -> list[str]:
    """The command that lets the server at ``url`` judge ``in.jsonl`` of a folder."""
    policy = f"{{engine: openai, model: m, base_url: '{url}'}}"
    scorer = f"{{name: j, kind: judge, policy: {policy}}}"
    (folder / "judge.yaml").write_text(f"input: {folder}/in.jsonl\noutput: {folder}/out.jsonl\nscorers: [{scorer}]\n")
    return ["score", "--config", f"{folder}/judge.yaml"]


@pytest.fixture(scope="module")
def commands(folder: Path, seed: int) -> Iterator[dict[str, list[str]]]:
    """Each stage that must survive, as a command that lacks its ``--output``."""
    write(folder / "in.jsonl", read(folder / "sampled.jsonl"))
    with FaultServer(grades, faults=0.3, seed=seed, stall=0.05, delay=0.002) as server:
        yield {
            "sample": ["sample", "--config", f"{folder}/sample.yaml"],
            "reward_model": ["score", "--input", f"{folder}/in.jsonl", "--reward_model", "tiny-rm"],
            "judge": judging(folder, server.url),
        }
        met = {request.fault for request in server.requests}
        assert not met or met >= {None, "429", "500", "timeout", "garbage"}


def size(path: Path) -> int:
    """Bytes of a file that another process may remove at any moment; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def items(path: Path) -> int:
    """Whole lines of a journal behind its header."""
    try:
        return max(0, path.read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def watched(command: list[str], output: Path, log: Path) -> tuple[int, float]:
    """Run a stage to its end; how many items its journal was seen to hold, and the seconds that each took."""
    process, seen, first, last = start(command, log), 0, 0.0, 0.0
    while process.is_alive():
        now = items(output.with_name(output.name + ".journal"))
        if now > seen:
            seen, last = now, time.monotonic()
            first = first or last
        time.sleep(0.0005)
    assert process.exitcode == 0, log.read_text()
    return seen, (last - first) / max(seen, 1)


def kill_many(stage: str, words: list[str], folder: Path, kills: int, rng: random.Random) -> int:
    """Kill a stage ``kills`` times, at random counts of its journal's items and a little later; compare all it wrote.

    Returns how many kills fell when part of the work, not all of it, was in the journal.
    """
    # A name of each call's own: in a file that another one finished there is nothing to do, and no journal to watch.
    name, log = f"{stage}-{kills}", folder / f"{stage}.log"
    for attempt in range(5):
        whole = folder / f"{name}-whole-{attempt}.jsonl"
        seen, pace = watched([*words, "--output", str(whole)], whole, log)
        if seen:  # on a busy machine this process may sleep through all of the other's life
            break
    done = midway = 0
    for attempt in range(10 * kills):
        output = folder / f"{name}-{rng.getrandbits(40)}.jsonl"
        journal = output.with_name(output.name + ".journal")
        while done < kills and items(journal) < seen and not output.exists():
            process = start([*words, "--output", str(output)], log)
            until = rng.randint(items(journal), seen)
            while process.is_alive() and items(journal) < until:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 4 * pace))
            done += killed(process)
            midway += 0 < items(journal) < seen
        assert finish([*words, "--output", str(output)], log) == 0, log.read_text()
        assert output.read_bytes() == whole.read_bytes(), f"attempt {attempt}"
        assert not journal.exists()
        assert [record.id for record in read(output)] == [f"p{i}" for i in range(PROMPTS)]
        if done == kills:
            return midway
    raise AssertionError(f"only {done} of {kills} kills found the stage alive")


@pytest.mark.parametrize("stage", STAGES)
def test_two_kills(stage: str, commands: dict[str, list[str]], folder: Path, seed: int) -> None:
    print("RANKALIGN_SEED =", seed)
    kill_many(stage, commands[stage], folder, 2, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), list(zip(STAGES, (17, 17, 16), strict=True)))
def test_fifty_kills(stage: str, kills: int, commands: dict[str, list[str]], folder: Path, seed: int) -> None:
    print("RANKALIGN_SEED =", seed)
    assert kill_many(stage, commands[stage], folder, kills, random.Random(seed)) > kills // 4


def test_a_judge_that_fails_for_good_is_no_answer(folder: Path, tmp_path: Path) -> None:
    """The run ends with an error, what was judged before stays, and the next run asks for the rest alone."""
    write(tmp_path / "in.jsonl", list(read(folder / "sampled.jsonl"))[:6])
    output, log, down = tmp_path / "out.jsonl", tmp_path / "log", threading.Event()
    with FaultServer(lambda request: {"choices": []} if down.is_set() else grades(request), delay=0.02) as server:
        words = judging(tmp_path, server.url)
        assert finish([*words, "--output", f"{tmp_path}/whole.jsonl"], log) == 0, log.read_text()
        asked = len(server.requests)
        process = start(words, log)
        while process.is_alive() and size(tmp_path / "out.jsonl.journal") < 4000:
            time.sleep(0.001)
        down.set()
        process.join()
        assert process.exitcode == 1, log.read_text()
        assert not output.exists()
        down.clear()
        before = len(server.requests)
        assert finish(words, log) == 0, log.read_text()
        assert len(server.requests) - before < asked
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_score_survives_the_loss_of_any_tail(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal of a scoring run, cut at many bytes, always leads to the same file."""
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def length(samples):\n    return [float(len(s)) for s in samples]\n")
    flags = ["--input", str(folder / "sampled.jsonl"), "--name", "length", "--function", f"{scorer}:length"]
    monkeypatch.setattr(generation, "SCORE_BATCH", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # keep the journal to cut it
        assert main(["score", *flags, "--output", str(tmp_path / "whole.jsonl")]) == 0
    journal = (tmp_path / "whole.jsonl.journal").read_bytes()
    rng = random.Random(5)
    for cut in rng.sample(range(len(journal)), 12):
        output = tmp_path / f"cut{cut}.jsonl"
        output.with_name(output.name + ".journal").write_bytes(journal[:cut])
        assert main(["score", *flags, "--output", str(output)]) == 0
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes(), cut
