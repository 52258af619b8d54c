"""IP-n and OP-k on the tiny model: who samples when, what is learned from it, crashes and kills, and the reward."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankalign.cli import main
from rankalign.config import SampleConfig, ScoreConfig, ScorerConfig, build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.engines import Policy, SamplingParams
from rankalign.models import load as models
from rankalign.recipes.iterate import IterateConfig, run
from rankalign.recipes.rounds import STRIDE
from rankalign.stages.generation import sample, score
from rankalign.storage.jsonl import loads, read_rows
from rankalign.training.arguments import parse_settings
from rankalign.training.run import train
from tests.faults.children import finish, killed, start

REWARD = """
def share(samples, prompts, outputs, **meta):
    return [sum('a' <= c <= 'z' for c in o) / max(len(o), 1) for o in outputs]
"""
TRAIN = {
    "learning_rate": 1e-2, "num_train_epochs": 2, "lr_scheduler_type": "cosine", "disable_tqdm": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "save_steps": 2,
    "save_total_limit": 20,
}  # fmt: skip
PROMPTS = 10  # three updates a pass, the last a short one; two passes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reward and prompts with an answer each."""
    (tmp_path / "reward.py").write_text(REWARD)
    save_prompts(tmp_path / "prompts.jsonl", PROMPTS, 0)
    return tmp_path


def save_prompts(path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    words = [" ".join(rng.choices(["red", "blue", "old", "new", "cat", "sea"], k=3)) for _ in range(count)]
    write(path, [CandidateSet(f"{path.stem}{i}", w, [Response("The sea.", "human")]) for i, w in enumerate(words)])


def content(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "output": str(folder / name),
        "prompts": str(folder / "prompts.jsonl"),
        "policies": [
            {"name": "own", "n": 3, "temperature": 1.0, "max_new_tokens": 8},
            {"name": "human", "engine": "replay"},
        ],
        "scorers": [{"name": "share", "kind": "function", "function": f"{folder}/reward.py:share"}],
        "judge": "share",
        "model": "tiny",
        **more,
        "train": {**TRAIN, **more.get("train", {})},
    }


def settings(folder: Path, name: str, **more: Any) -> IterateConfig:
    return build(IterateConfig, content(folder, name, **more), "test")


def own(path: Path) -> list[Response]:
    """The trained model's answers in a file."""
    return [r for record in read(path) for r in record.responses if r.policy == "own"]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(model / "model.safetensors"))


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- IP-n --------------------------------------------------------------------------------------------------------


def test_the_second_round_samples_with_the_first_rounds_model(folder: Path) -> None:
    result = run(settings(folder, "ip", train={"num_train_epochs": 1}))
    first, second = folder / "ip/round-1", folder / "ip/round-2"
    assert result["model"] == str(folder / "ip/model")
    assert [row["model"] for row in result["rounds"]] == [str(first / "model"), result["model"]]
    assert {r.sampling["weights"] for r in own(first / "candidates.jsonl")} == {fingerprint("tiny")}
    assert {r.sampling["weights"] for r in own(second / "candidates.jsonl")} == {fingerprint(str(first / "model"))}
    assert {(r.sampling["round"], r.sampling["step"]) for r in own(second / "candidates.jsonl")} == {(2, 3)}
    drawn = [r.text for r in own(second / "candidates.jsonl")]
    assert answers(folder, "again", str(first / "model")) == drawn
    damaged = folder / "damaged"
    models.load_policy(str(first / "model")).save_pretrained(damaged)
    models.load_tokenizer("tiny").save_pretrained(damaged)
    save_file({k: v * 1.02 for k, v in weights(damaged).items()}, damaged / "model.safetensors", {"format": "pt"})
    assert answers(folder, "other", str(damaged)) != drawn
    assert loads((folder / "ip/round-2/sampled.jsonl.manifest.json").read_text())["settings"]["policies"][0][
        "model_sha256"
    ] == models.weights_fingerprint(first / "model")
    check_result(folder, result)
    check_rerun(folder, result)


def fingerprint(model: str) -> str:
    return models.weights_fingerprint(models.resolve(model))[:16]


def answers(folder: Path, name: str, model: str) -> list[str]:
    """What a model answers in round 2."""
    policy = Policy("own", model=model, sampling=SamplingParams(n=3, max_new_tokens=8, seed=STRIDE))
    sample(SampleConfig(str(folder / "prompts.jsonl"), str(folder / f"{name}.jsonl"), [policy]))
    return [r.text for r in own(folder / f"{name}.jsonl")]


def check_result(folder: Path, result: dict[str, Any]) -> None:
    """Figures of a round from its records and plain arithmetic; the log's global steps."""
    for row in result["rounds"]:
        means, tops, tokens = [], [], 0
        for record in read(folder / f"ip/round-{row['round']}/candidates.jsonl"):
            values = [r.scores["share"] for r in record.responses for _ in range(r.count)]
            assert list(record.responses[0].scores) == ["share"]  # no KL, plain scores
            means.append(sum(values) / 4)
            tops.append(max(values))
            tokens += sum((len(r.tokens["ids"]) + r.finished) * r.count for r in record.responses if r.policy == "own")
        assert row["mean_score"] == pytest.approx(sum(means) / PROMPTS, abs=1e-12)
        assert row["max_score"] == pytest.approx(sum(tops) / PROMPTS, abs=1e-12)
        assert (row["sampled_tokens"], row["kl"], row["prompts"], row["steps"]) == (tokens, None, PROMPTS, 3)
    assert result["steps"] == 6
    assert result["sampled_tokens"] == sum(row["sampled_tokens"] for row in result["rounds"])
    lines = [line for _, line in read_rows(folder / "ip/log.jsonl") if "loss" in line]
    assert [(line["step"], line["refreshed_at"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3), (6, 3)]


def check_rerun(folder: Path, result: dict[str, Any]) -> None:
    kept = {p: p.stat().st_mtime_ns for p in (folder / "ip").rglob("*")}
    again = run(settings(folder, "ip", train={"num_train_epochs": 1}))
    assert {**result, "already_finished": True} == again
    assert {p: p.stat().st_mtime_ns for p in (folder / "ip").rglob("*")} == kept


@pytest.mark.slow
def test_raft_with_a_threshold_learns_what_is_kept_and_keeps_the_last_model(folder: Path) -> None:
    more = {"keep_above": [0.5, 1.0], "keep": "last", "train": {"loss": "raft", "num_train_epochs": 1}}
    result = run(settings(folder, "raft", rounds=2, **more))
    assert not (folder / "raft/round-1/model").exists()
    models.load_policy(result["model"])
    for number, quantile in ((1, 0.5), (2, 1.0)):
        for record in read(folder / f"raft/round-{number}/candidates.jsonl"):
            values = torch.tensor([r.scores["share"] for r in record.responses], dtype=torch.float64)
            border = float(values.quantile(quantile))
            assert [r.scores["share-top"] for r in record.responses] == [float(v >= border) for v in values.tolist()]
    facts = loads((folder / "raft/model/manifest.json").read_text())
    assert (facts["settings"]["judge"], facts["settings"]["loss"]) == ("share-top", "raft")


# --- OP-k --------------------------------------------------------------------------------------------------------


def test_the_policy_is_refreshed_every_k_updates(folder: Path) -> None:
    result = run(settings(folder, "op", refresh_every=2))
    lines = [line for _, line in read_rows(folder / "op/log.jsonl") if "loss" in line]
    assert [(line["step"], line["refreshed_at"]) for line in lines] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4)]
    assert [(r["steps"], r["refreshed_at"]) for r in result["rounds"]] == [(2, 0), (2, 2), (2, 4)]
    started = [("tiny", 1), (str(folder / "op/model/checkpoint-2"), 2), (str(folder / "op/model/checkpoint-4"), 3)]
    for model, number in started:
        found = own(folder / f"op/round-{number}/candidates.jsonl")
        assert {r.sampling["weights"] for r in found} == {fingerprint(model)}
        assert {r.sampling["step"] for r in found} == {2 * (number - 1)}
    walked = [[int(r.id[7:]) for r in read(folder / f"op/round-{i}/candidates.jsonl")] for i in (1, 2, 3)]
    assert walked == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    # In memory and from the folder of the same weights, one model answers alike.
    policy = Policy("own", model=started[1][0], sampling=SamplingParams(n=3, max_new_tokens=8, seed=STRIDE))
    models.load_tokenizer("tiny").save_pretrained(started[1][0])
    sample(SampleConfig(str(folder / "op/round-2/prompts.jsonl"), str(folder / "alone.jsonl"), [policy]))
    texts = [r.text for r in own(folder / "alone.jsonl")]
    assert texts == [r.text for r in own(folder / "op/round-2/candidates.jsonl")]


@pytest.mark.parametrize("loss", ["rrhf", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_block_as_long_as_the_run_is_offline_training(folder: Path, loss: str) -> None:
    result = run(settings(folder, "op", refresh_every=100, train={"loss": loss}))
    assert [row["steps"] for row in result["rounds"]] == [6]
    data, output = folder / "op/round-1/candidates.jsonl", folder / "offline"
    more = {"loss": loss, "train_sampling_strategy": "sequential", "judge": "share", "model": "tiny", "seed": 0}
    train(parse_settings({**TRAIN, **more, "data": str(data), "output_dir": str(output)}))
    assert same(folder / "op/model", output)
    assert not same(folder / "op/model", Path(models.resolve("tiny")))
    assert losses(folder / "op/log.jsonl") == losses(output / "log.jsonl")


def losses(log: Path) -> list[float]:
    found = [line["loss"] for _, line in read_rows(log) if "loss" in line]
    assert len(found) == 6
    return found


def test_the_penalised_score_is_what_an_online_run_learns_from(folder: Path) -> None:
    result = run(settings(folder, "kl", refresh_every=3, kl_coef=0.05))
    for number in (1, 2):
        for record in read(folder / f"kl/round-{number}/candidates.jsonl"):
            for r in record.responses:
                assert r.scores["share-kl"] == r.scores["share"] - 0.05 * r.scores["kl"]
                assert (r.scores["kl"] == 0) == (number == 1)  # the first block is the start model's
    found = [r.scores["kl"] for r in own(folder / "kl/round-2/candidates.jsonl") for _ in range(r.count)]
    assert result["rounds"][1]["kl"] == pytest.approx(sum(found) / len(found), abs=1e-12)
    assert loads((folder / "kl/model/manifest.json").read_text())["settings"]["judge"] == "share-kl"


def test_prompts_without_a_score_are_left_out_and_the_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole micro-batch of them (2, 3) and a whole update (8, 9)."""
    prompts = list(read(folder / "prompts.jsonl"))
    for i in (2, 3, 8, 9):
        prompts[i].prompt = f"unknown {i}"
    write(folder / "prompts.jsonl", prompts)
    silent = "\ndef some(samples, prompts, outputs):\n    shares = share(samples, prompts, outputs)\n"
    silent += "    return [None if 'unknown' in p else s for p, s in zip(prompts, shares)]\n"
    (folder / "reward.py").write_text(REWARD + silent)
    scorer = {"name": "share", "kind": "function", "function": f"{folder}/reward.py:some"}
    result = run(settings(folder, "op", refresh_every=3, scorers=[scorer], train={"num_train_epochs": 1}))
    assert "4 dropped_prompts" in capsys.readouterr().err
    lines = [line for _, line in read_rows(folder / "op/log.jsonl") if "loss" in line]
    assert [line["candidates"] for line in lines] == [8, 16, 0]
    assert lines[2]["loss"] == 0
    assert (result["steps"], result["rounds"][0]["prompts"]) == (3, 10)


# --- interruptions -----------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Nothing in the package catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Crash at the n-th time that anything is forced to disk; returns how many there have been."""
    calls, real = [0], os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise Crash
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: calls[0]


def seed_of_today() -> int:
    return int(os.environ.get("RANKALIGN_SEED") or random.SystemRandom().randrange(10**6))


def test_an_online_run_survives_three_crashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seed_of_today()
    print("RANKALIGN_SEED =", seed)
    more: dict[str, Any] = {"refresh_every": 2, "train": {"save_steps": 3}}  # checkpoints fall within blocks, too
    with monkeypatch.context() as patch:
        counted = crash_at(patch, 0)
        run(settings(folder, "whole", **more))
        total = counted()
    rng = random.Random(seed)
    for _ in range(3):  # in three quarters of what the whole takes, it cannot end before the last
        with monkeypatch.context() as patch:
            crash_at(patch, rng.randrange(2, total // 4))
            with pytest.raises(Crash):
                run(settings(folder, "cut", **more))
    run(settings(folder, "cut", **more))
    check_equal(folder)


def check_equal(folder: Path) -> None:
    """All that the two runs wrote, but times, paths and what names them."""
    files = sorted(p.relative_to(folder / "whole") for p in (folder / "whole").rglob("*.jsonl"))
    assert len(files) >= 6
    for path in files:
        a, b = folder / "whole" / path, folder / "cut" / path
        if path.name == "log.jsonl":
            assert without_times(a) == without_times(b)
        else:
            assert a.read_bytes() == b.read_bytes(), path
    name = "model/model.safetensors"
    assert (folder / "whole" / name).read_bytes() == (folder / "cut" / name).read_bytes()
    assert result_of(folder / "whole") == result_of(folder / "cut")


def without_times(log: Path) -> list[dict[str, Any]]:
    """The log without times, and without the trainer's last line's mean since it was started."""
    vain = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    return [{key: value for key, value in line.items() if key not in vain} for _, line in read_rows(log)]


def result_of(run_folder: Path) -> str:
    return (run_folder / "result.json").read_text().replace(str(run_folder), "")


def files_in(place: Path) -> int:
    """How far a run is: the number of its files."""
    return sum(len(names) for _, _, names in os.walk(place))


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 2])
def test_three_kills(folder: Path, every: int) -> None:
    """kill -9 at random moments of IP-2 and of OP-2."""
    seed = seed_of_today()
    print("RANKALIGN_SEED =", seed)
    rng, log = random.Random(seed), folder / "out.log"
    (folder / "c.yaml").write_text(json.dumps(content(folder, "whole", refresh_every=every)))
    words = ["iterate", "--config", str(folder / "c.yaml"), "--output"]
    assert finish([*words, str(folder / "whole")], log) == 0, log.read_text()
    total = files_in(folder / "whole")
    for moment in sorted(rng.sample(range(2, total * 3 // 4), 3)):
        process = start([*words, str(folder / "cut")], log)
        while process.is_alive() and files_in(folder / "cut") < moment:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        assert killed(process), log.read_text()
    assert finish([*words, str(folder / "cut")], log) == 0, log.read_text()
    check_equal(folder)


@pytest.mark.slow
def test_a_block_that_other_weights_wrote_is_written_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Updates that do not repeat to the bit, as on a GPU: what was sampled after the checkpoint is of no use."""
    more: dict[str, Any] = {"refresh_every": 3, "train": {"save_strategy": "no"}}
    run(settings(folder, "whole", **more))
    run(settings(folder, "cut", **more))
    for path in (folder / "cut/model", folder / "cut/round-2/candidates.jsonl"):
        path.rename(path.with_name("gone"))
    (folder / "cut/manifest.json").unlink()
    (folder / "cut/round-2/weights.json").write_text('{"weights": "others"}')
    run(settings(folder, "cut", **more))
    assert "written by other weights" in capsys.readouterr().err
    check_equal(folder)


# --- does it help ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"rounds": 3}, {"refresh_every": 8, "train": {"num_train_epochs": 9}}])
def test_the_reward_rises_over_rounds(folder: Path, setting: dict[str, Any]) -> None:
    """Held-out mean reward of the start and the final model over five seeds, measured as the candidates are."""
    save_prompts(folder / "prompts.jsonl", 24, 1)
    save_prompts(folder / "heldout.jsonl", 24, 2)
    gains = []
    fast = {
        "num_train_epochs": 3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "warmup_steps": 0, "save_strategy": "no",
        "loss_options": {"sft_reduction": "mean"}, **setting.get("train", {}),
    }  # fmt: skip
    policies = [{"name": "own", "n": 6, "temperature": 1.0, "max_new_tokens": 16}]
    for seed in range(5):
        more = {**setting, "policies": policies, "seed": seed, "train": fast}
        result = run(settings(folder, f"seed{seed}", **more))
        before, after = (held_out(folder, model, seed) for model in ("tiny", result["model"]))
        last = result["rounds"][-1]
        gains.append(after - before)
        means = " ".join(f"{row['mean_score']:.3f}" for row in result["rounds"])
        print(f"seed {seed}: train mean by round {means}; last round max-of-n {last['max_score']:.3f};", end=" ")
        print(f"held-out {before:.3f} -> {after:.3f}")
        assert last["mean_score"] > result["rounds"][0]["mean_score"]
    half = 2.776 * statistics.stdev(gains) / 5**0.5  # Student's t, 4 degrees of freedom, 95 %
    print(
        f"gain {statistics.mean(gains):.3f} [{statistics.mean(gains) - half:.3f}, {statistics.mean(gains) + half:.3f}]"
    )
    assert statistics.mean(gains) - half > 0


def held_out(folder: Path, model: str, seed: int) -> float:
    """Mean reward of six answers to each held-out prompt."""
    raw, path = (folder / f"{kind}-{Path(model).parent.name}-{seed}.jsonl" for kind in ("raw", "held"))
    policy = Policy("own", model=model, sampling=SamplingParams(n=6, max_new_tokens=16, seed=seed))
    sample(SampleConfig(str(folder / "heldout.jsonl"), str(raw), [policy]))
    score(ScoreConfig(str(raw), str(path), [ScorerConfig("s", "function", {"function": f"{folder}/reward.py:share"})]))
    means = [sum(r.scores["s"] * r.count for r in record.responses) / 6 for record in read(path)]  # type: ignore[operator]
    return sum(means) / len(means)


def test_the_command_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = content(folder, "run", max_prompts=4, rounds=1, train={"num_train_epochs": 1})
    (folder / "c.yaml").write_text(json.dumps(small))
    assert main(["iterate", "--config", str(folder / "c.yaml"), "--train", '{"max_steps": 1}', "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["rounds"][0]["prompts"]) == (1, 4)
    assert main(["iterate", "--config", str(folder / "c.yaml"), "--train", '{"max_steps": 1}']) == 0
    assert "model:" in capsys.readouterr().out
    assert main(["iterate", "--config", str(folder / "c.yaml"), "--kl_coef", "0.5"]) == 1
    assert "kl_coef" in capsys.readouterr().err
    assert main(["iterate", "--config", str(folder / "c.yaml"), "--train", "[1"]) == 1
    assert "--train: expected a JSON object" in capsys.readouterr().err
