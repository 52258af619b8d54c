"""IP-n and OP-k in two processes against one at the same global batch: records, weights, log, and kills."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.recipes import apart
from rankalign.storage.jsonl import read_rows
from tests.e2e.distributed import command, furthest, launch_and_kill

REWARD = """
def share(samples, prompts, outputs, **meta):
    shares = [sum('a' <= c <= 'z' for c in o) / max(len(o), 1) for o in outputs]
    return [None if 'unknown' in p else s for p, s in zip(prompts, shares)]
"""
TRAIN = {
    "learning_rate": 2e-3, "max_steps": 4, "lr_scheduler_type": "cosine", "disable_tqdm": True, "use_cpu": True,
    "save_steps": 1, "save_total_limit": 20, "max_grad_norm": 20.0, "warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip
DPO_KL: dict[str, Any] = {"kl_coef": 0.05, "train": {"loss": "dpo"}}
LORA_KL: dict[str, Any] = {"kl_coef": 0.05, "train": {"use_lora": True}}
# A reference that moves at each refresh, and answers that the start model has a share in.
# AdamW moves a weight whose gradient is all rounding by the rate, up or down: at 2e-3 one was 1.01e-5 off on a Xeon.
MOVING: dict[str, Any] = {
    "train": {
        "loss": "dpo",
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.5,
        "learning_rate": 1e-3,
    },
    "policies": [
        {"name": "own", "n": 3, "temperature": 1.0, "max_new_tokens": 8, "start_share": 0.3},
        {"name": "human", "engine": "replay"},
    ],
}
SHARED: dict[str, Any] = {"policies": MOVING["policies"], "train": {"loss": "gspo"}}
WORDS = ["red", "blue", "old", "new", "cat", "sea"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reward, and ten prompts, of which two get no score, which leaves one process with nothing to run."""
    (tmp_path / "reward.py").write_text(REWARD)
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=3)) if i not in (4, 5) else f"unknown {i}" for i in range(10)]
    write(
        tmp_path / "prompts.jsonl",
        [CandidateSet(f"p{i}", p, [Response("The sea.", "h")]) for i, p in enumerate(prompts)],
    )
    return tmp_path


def settings(folder: Path, batch: int, **more: Any) -> Path:
    """A file of settings whose processes take so many prompts of an update of four in a micro-batch."""
    content = {
        "output": "unused",
        "prompts": str(folder / "prompts.jsonl"),
        "policies": [
            {"name": "own", "n": 3, "temperature": 1.0, "max_new_tokens": 8},
            {"name": "human", "engine": "replay"},
        ],
        "scorers": [{"name": "share", "kind": "function", "function": f"{folder}/reward.py:share"}],
        "judge": "share",
        "model": "tiny",
        **more,
        "train": {**TRAIN, "per_device_train_batch_size": batch, **more.get("train", {})},
    }
    path = folder / f"{batch}.yaml"
    path.write_text(json.dumps(content))
    return path


def iterate(folder: Path, name: str, config: Path, *words: str) -> list[str]:
    return ["iterate", "--config", str(config), "--output", str(folder / name), *words]


def started(line: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=900, check=False)


def check_equal(folder: Path, rounds: int) -> None:
    """Records to the byte, weights and log but for the order of float32 sums."""
    one, two = folder / "one", folder / "two"
    for number in range(1, rounds + 1):
        for name in ("sampled.jsonl", "candidates.jsonl"):
            path = f"round-{number}/{name}"
            ours, theirs = ((run / path).read_text() for run in (one, two))
            if number == 1:
                assert theirs == ours
            else:
                check_alike(ours, theirs)
    assert furthest(one / "model", two / "model") < 1e-5
    for line, other in zip(losses(one), losses(two), strict=True):
        assert {**other, "epoch": line["epoch"]} == pytest.approx(line, rel=1e-3, abs=1e-5)
    assert len(losses(one)) == 4 * (rounds if (one / "round-1/log.jsonl").exists() else 1)


def check_alike(ours: str, theirs: str) -> None:
    """Records but for the fingerprint of the weights that wrote them and the last bits of scores: a KL is a difference
    of sums of 30 to 60 nats, whose float32 steps are 4e-6."""
    (rows, scores), (others, their_scores) = unsigned(ours), unsigned(theirs)
    assert others == rows
    for mine, other in zip(scores, their_scores, strict=True):
        assert other == pytest.approx(mine, rel=0, abs=3e-5)


def unsigned(text: str) -> tuple[list[Any], list[dict[str, float]]]:
    """Records without the fingerprint of the weights that wrote them, and their scores, answer by answer."""
    rows, scores = [json.loads(line) for line in text.splitlines()], list[dict[str, float]]()
    for row in rows:
        for response in row["responses"]:
            response.get("sampling", {}).pop("weights", None)
            scores.append({name: v for name, v in response.pop("scores", {}).items() if v is not None})
    return rows, scores


def losses(run: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_rows(run / "log.jsonl") if "loss" in line]


# --- OP-k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [pytest.param("ddp", MOVING, id="moving"), pytest.param("fsdp", DPO_KL, id="fsdp", marks=pytest.mark.slow)],
)
def test_online_in_two_processes_is_one(one_thread: None, folder: Path, kind: str, more: dict[str, Any]) -> None:
    assert main(iterate(folder, "one", settings(folder, 4, refresh_every=2, **more))) == 0
    done = started(command(kind, iterate(folder, "two", settings(folder, 2, refresh_every=2, **more))))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("each process has all weights") == (kind == "fsdp")
    check_equal(folder, 2)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param("ddp", {}, id="rrhf"),
        pytest.param("ddp", DPO_KL, id="dpo-kl", marks=pytest.mark.slow),
        pytest.param("ddp", LORA_KL, id="lora", marks=pytest.mark.slow),
        pytest.param("ddp", MOVING, id="moving", marks=pytest.mark.slow),
        pytest.param("zero2", {"train": {"loss": "dpo"}}, id="zero2", marks=pytest.mark.slow),
        *(
            pytest.param(kind, more, id=f"{kind}-{name}", marks=pytest.mark.slow)
            for kind in ("fsdp", "zero3")
            for name, more in {"dpo-kl": DPO_KL, "lora": LORA_KL, "share": SHARED, "ahead": {"ahead": 1}}.items()
        ),
    ],
)
def test_online_in_two_processes_killed_at_random_is_one(
    one_thread: None, folder: Path, kind: str, more: dict[str, Any]
) -> None:
    seed = int(os.environ.get("RANKALIGN_SEED") or random.SystemRandom().randrange(10**6))
    print("RANKALIGN_SEED =", seed)
    assert main(iterate(folder, "one", settings(folder, 4, refresh_every=2, **more))) == 0
    words = iterate(folder, "two", settings(folder, 2, refresh_every=2, **more))
    total = files_in(folder / "one")
    moment = random.Random(seed).randrange(2, total - 4)
    assert launch_and_kill(kind, words, lambda: files_in(folder / "two") >= moment)
    done = started(command(kind, words))
    assert done.returncode == 0, done.stderr[-3000:]
    # Only the first process speaks, and a run that was killed behind its second round's answers has nothing to say.
    assert done.stderr.count("round 2: the weights of step 2 answer") <= 1
    check_equal(folder, 2)


@pytest.mark.slow
def test_in_16_bits_the_first_loss_is_that_of_one_model(one_thread: None, folder: Path) -> None:
    """Policy, in shards, and reference, whole, are computed alike: DPO begins at ln 2."""
    config = settings(folder, 2, refresh_every=2, train={"loss": "dpo", "bf16": True})
    done = started(command("zero3", iterate(folder, "two", config)))
    assert done.returncode == 0, done.stderr[-3000:]
    first, *_, last = losses(folder / "two")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(last["loss"] - math.log(2)) > 1e-3


def files_in(place: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(place))


# --- IP-n --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [("ddp", 1), *(pytest.param(kind, 2, marks=pytest.mark.slow) for kind in ("ddp", "fsdp", "zero2", "zero3"))],
)
def test_rounds_in_two_processes_are_those_of_one(
    one_thread: None, folder: Path, kind: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP and DeepSpeed by the launcher that tests have for them on a CPU, the training's words being ours."""
    batch = {"launch": "ddp", "num_processes": 2}
    if kind != "ddp":
        monkeypatch.setattr(apart, "launcher", lambda how, count, words: command(kind, ["train", *words]))
    assert main(iterate(folder, "one", settings(folder, 4, rounds=rounds))) == 0
    assert main(iterate(folder, "two", settings(folder, 2, rounds=rounds, **batch))) == 0
    check_equal(folder, rounds)
    assert not list((folder / "two").glob("round-*/tokens"))
    assert "processes" in json.loads((folder / "two/manifest.json").read_text())["settings"]


@pytest.mark.slow
def test_rounds_that_were_killed_go_on(one_thread: None, folder: Path) -> None:
    """The command alone, at random: samplers and training end by themselves, and the next one waits for that."""
    seed = int(os.environ.get("RANKALIGN_SEED") or random.SystemRandom().randrange(10**6))
    print("RANKALIGN_SEED =", seed)
    rng = random.Random(seed)
    assert main(iterate(folder, "one", settings(folder, 4, rounds=2))) == 0
    config = settings(folder, 2, rounds=2)
    total = files_in(folder / "one")
    line = [*command("ddp", [])[:1], "-m", "rankalign", *iterate(folder, "two", config, "--num_processes", "2")]
    for moment in sorted(rng.sample(range(2, total * 3 // 4), 2)):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and files_in(folder / "two") < moment:
            time.sleep(0.01)
        process.kill()
        process.wait()
    done = started(line)
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(folder, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launch", "fsdp2", "--num_processes", "2"], "accelerate has no FSDP for CPUs"),
        (["--launch", "ddp"], "say --num_processes N"),
        (["--num_processes", "-1"], "num_processes -1 makes no sense"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is_sampled(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(iterate(folder, "run", settings(folder, 2), *words)) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "run").exists()
