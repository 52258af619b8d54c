"""The paper's comparison on the tiny model: rows, figures against the files they come from, and interruptions."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError
from rankalign.recipes.paper import unit
from rankalign.recipes.paper.child import Lock
from rankalign.recipes.paper.metered import peak_bytes

REWARD = """
def share(samples, prompts, outputs, **meta):
    return [sum('a' <= c <= 'z' for c in o) / max(len(o), 1) for o in outputs]
"""
ROWS: list[dict[str, Any]] = [
    {"name": "start", "title": "start", "kind": "start"},
    {"name": "best_of", "title": "best of 3", "kind": "best_of"},
    {"name": "rrhf_dp", "title": "RRHF | DP", "policies": ["drawn", "human"], "train": {"loss": "rrhf"}},
    {"name": "dpo", "title": "DPO", "policies": ["drawn", "human"], "train": {"loss": "dpo"}},
    {
        "name": "ppo",
        "title": "PPO",
        "train": {"method": "ppo", "rollouts": 4, "max_steps": 2, "max_new_tokens": 8, "ppo_epochs": 1},
    },
    {"name": "rrhf_ip2", "title": "IP-2", "kind": "iterate", "policies": ["drawn", "human"], "iterate": {"rounds": 2}},
    {
        "name": "rloo",
        "title": "RLOO",
        "kind": "iterate",
        "policies": ["drawn"],
        "iterate": {"refresh_every": 1, "kl_coef": 0.05},
        "train": {"loss": "rloo"},
    },
    {
        "name": "grpo",
        "title": "GRPO",
        "kind": "iterate",
        "policies": ["drawn"],
        "iterate": {"refresh_every": 1},
        "train": {"loss": "grpo"},
    },
    {
        "name": "rebel",
        "title": "REBEL",
        "kind": "iterate",
        "policies": ["drawn"],
        "iterate": {"rounds": 1},
        "train": {"loss": "rebel"},
    },
    {
        "name": "online_dpo",
        "title": "online DPO",
        "kind": "iterate",
        "policies": ["drawn"],
        "iterate": {"refresh_every": 1},
        "train": {"loss": "dpo"},
    },
    {"name": "rrhf_op", "title": "OP-1", "kind": "iterate", "policies": ["drawn"], "iterate": {"refresh_every": 1}},
]


def config(folder: Path, names: list[str], output: str = "table", **more: Any) -> Path:
    rng = random.Random(0)
    for name, count in (("train", 5), ("heldout", 5)):
        words = [" ".join(rng.choices(["red", "blue", "old", "new", "cat"], k=3)) for _ in range(count)]
        human = [Response("a good day", "human")]
        write(folder / f"{name}.jsonl", [CandidateSet(f"{name}{i}", text, human) for i, text in enumerate(words)])
    (folder / "reward.py").write_text(REWARD)
    settings = {
        "output": str(folder / output),
        "prompts": str(folder / "train.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "max_prompts": 4,
        "max_heldout": 3,
        "model": "tiny",
        "reward": f"{folder}/reward.py:share",
        "seeds": [1],
        "policies": [
            {"name": "drawn", "n": 2, "max_new_tokens": 8},
            {"name": "human", "engine": "replay", "only": "human"},
        ],
        "dataset": ["human"],
        "answer": {"n": 3, "max_new_tokens": 8},
        "train": {
            "learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 2, "use_cpu": True,
            "gradient_accumulation_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_length": 128,
        },
        "rows": [row for row in ROWS if row["name"] in names],
        **more,
    }  # fmt: skip
    (folder / f"{output}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / f"{output}.yaml"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training runs in this process, to be quick; the folders of the units that trained."""
    calls: list[str] = []

    def here(folder: Path, command: str, settings: dict[str, Any], lock: Lock) -> Any:
        calls.append(folder.name)
        path, out = folder / "here.yaml", io.StringIO()
        path.write_text(json.dumps(settings))
        with contextlib.redirect_stdout(out):
            assert main([command, "--config", str(path), "--json"]) == 0
        return json.loads(out.getvalue()), {"seconds": 2.0, "peak_bytes": 3e9}

    monkeypatch.setattr(unit, "run_metered", here)
    return calls


def table(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["table", "--config", str(path), "--json", *flags]) == 0
    return dict(json.loads(capsys.readouterr().out))


def figures(folder: Path, row: str, seed: int = 1) -> dict[str, Any]:
    return dict(json.loads((folder / f"seed-{seed}" / row / "unit.json").read_text()))


def models(folder: Path) -> dict[str, int]:
    """By title, the column of models; what each training says that it loads was read once from its log."""
    page = (folder / "results.md").read_text()
    lines = [line.split(" | ") for line in page.split("## What it took")[1].split("## ")[0].splitlines()]
    return {line[0].removeprefix("| "): int(line[3]) for line in lines if len(line) == 7 and line[3].isdecimal()}


def test_rows_and_figures(tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, ["start", "best_of", "rrhf_dp", "dpo", "ppo"])
    told = table(path, capsys)
    assert (told["units"], told["ran"], trained) == (5, 5, ["rrhf_dp", "dpo", "ppo"])
    check_answers(tmp_path / "table")
    check_costs(tmp_path / "table")
    page = (tmp_path / "table/results.md").read_text()
    assert "| RRHF \\| DP |" in page
    assert models(tmp_path / "table") == {"start": 1, "best of 3": 1, "RRHF \\| DP": 1, "DPO": 2, "PPO": 2}
    assert "lacks the rows it needs: no_rank." in page
    assert not list((tmp_path / "table").rglob("work")), "models stay on disk"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert table(path, capsys)["ran"] == 0
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert len(trained) == 3


def test_rows_of_policy_gradients_and_what_would_decide(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seeds of the on-policy rows: as many answers as PPO's, a claim each, and sample sizes where one is open."""
    names = ["start", "dpo", "ppo", "rloo", "grpo", "rebel", "online_dpo"]
    told = table(config(tmp_path, names, seeds=[1, 2]), capsys)
    assert (told["units"], told["ran"]) == (14, 14)
    page = (tmp_path / "table/results.md").read_text()
    for claim in ("policy gradients without a critic", "REBEL reaches at least", "DPO gains by learning from its own"):
        assert f"**{claim}" in page
    two = {"DPO": 2, "PPO": 2, "RLOO": 2, "REBEL": 2, "online DPO": 2}
    assert models(tmp_path / "table") == {"start": 1, "GRPO": 1} | two
    assert page.count("not decided;") == page.count("would decide it if the figure stays")
    for row in ("rloo", "grpo", "online_dpo"):
        assert figures(tmp_path / "table", row)["cost"]["sampled"] > 0
    for seed in (1, 2):  # common random numbers: rows that were not moved at all would answer alike
        first = read(tmp_path / f"table/seed-{seed}/start/answers.jsonl")
        other = read(tmp_path / f"table/seed-{seed}/rloo/answers.jsonl")
        assert [[r.sampling["seed"] for r in s.responses] for s in first] == [
            [r.sampling["seed"] for r in s.responses] for s in other
        ]


def test_graders_that_nothing_is_trained_on(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Added to a table that ran: no unit runs again, and the columns are the answers' lengths as counted here."""
    names = ["start", "best_of", "rrhf_dp"]
    before = table(config(tmp_path, names, seeds=[1, 2]), capsys)
    assert "## By other graders" not in Path(before["page"]).read_text()
    (tmp_path / "length.py").write_text("def count(outputs, **_):\n    return [len(o) for o in outputs]\n")
    grader = {"name": "length", "kind": "function", "options": {"function": f"{tmp_path}/length.py:count"}}
    path = config(tmp_path, names, seeds=[1, 2], graders=[grader])
    told = table(path, capsys)
    assert (told["ran"], trained) == (0, ["rrhf_dp"] * 2)
    found: dict[str, float] = {}
    for row in names:
        lengths = []
        for seed in (1, 2):
            for one in read(tmp_path / f"table/seed-{seed}/{row.replace('best_of', 'start')}/answers.jsonl"):
                drawn = [r for r in one.responses for _ in range(r.count)]
                best = max(drawn, key=lambda r: r.scores["reward"])
                lengths.append(len(best.text) if row == "best_of" else np.mean([len(r.text) for r in drawn]))
        found[row] = float(np.mean(lengths))
    lines = [line.split(" | ") for line in Path(told["page"]).read_text().split("## By other graders")[1].splitlines()]
    shown = {line[0].removeprefix("| "): [cell.split(" [")[0].strip(" |") for cell in line[1:]] for line in lines[4:9]}
    titles = {row["name"]: str(row["title"]).replace("|", "\\|") for row in ROWS}
    for row in names:
        own, gain = shown[titles[row]]
        assert float(own) == pytest.approx(found[row], rel=1e-3)
        assert gain == "–" if row == "start" else float(gain) == pytest.approx(found[row] - found["start"], abs=0.02)
    once = (tmp_path / "table/seed-1/start/graded.length.jsonl").read_bytes()
    assert table(path, capsys)["ran"] == 0
    assert (tmp_path / "table/seed-1/start/graded.length.jsonl").read_bytes() == once
    (tmp_path / "length.py").write_text("def count(outputs, **_):\n    return [2 * len(o) for o in outputs]\n")
    assert main(["table", "--config", str(path)]) == 1
    assert "graded.length.jsonl" in capsys.readouterr().err


def check_answers(folder: Path) -> None:
    """Rewards from the texts by hand; the best of 3 from the start model's."""
    texts = [[r.text for r in s.responses for _ in range(r.count)] for s in read(folder / "seed-1/start/answers.jsonl")]
    rewards = [[sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in of] for of in texts]
    assert [len(of) for of in rewards] == [3, 3, 3]
    start, best = figures(folder, "start")["held"], figures(folder, "best_of")["held"]
    assert start["reward"] == pytest.approx([sum(of) / 3 for of in rewards], abs=1e-12)
    assert best["reward"] == pytest.approx([max(of) for of in rewards], abs=1e-12)
    assert start["kl"] == [0.0] * 3
    assert best["kl"] == pytest.approx([math.log(3) - 2 / 3] * 3)
    assert all(len(column) == 3 for column in figures(folder, "ppo")["held"].values())
    pool = figures(folder, "rrhf_dp")["pool"]
    assert len(pool["mean"]) == 4
    assert np.all(np.array(pool["mean"]) <= np.array(pool["max"]))


def check_costs(folder: Path) -> None:
    """Tokens by counting: the tiny tokenizer has one a byte, and plain prompts begin with one more."""
    sets = list(read(folder / "seed-1/rrhf_dp/candidates.jsonl"))
    length = {id(r): len(r.tokens["ids"] if r.tokens else r.text) + r.finished for s in sets for r in s.responses}
    assert all(len(r.tokens["ids"]) <= 8 for s in sets for r in s.responses if r.tokens)
    drawn = sum(length[id(r)] * r.count for s in sets for r in s.responses if r.policy == "drawn")
    rendered = "<|user|>\n{}<|eos|>\n<|assistant|>\n"
    prompts = [1 + len(rendered.format(s.prompt)) - len("<|user|><|eos|><|assistant|>") + 3 for s in sets]
    lists = sum(prompts) + sum(length.values())
    rrhf, dpo, ppo = (figures(folder, row)["cost"] for row in ("rrhf_dp", "dpo", "ppo"))
    assert rrhf["sampled"] == dpo["sampled"] == drawn
    assert (rrhf["forward"], rrhf["backward"]) == (drawn + sum(prompts) + lists, lists)
    assert (dpo["forward"], dpo["backward"]) == (rrhf["forward"] + lists, lists)
    assert rrhf["peak_bytes"] == 3e9
    assert ppo["backward"] == pytest.approx(ppo["sampled"] + 2 * sum(prompts))  # 8 rollouts, each prompt twice
    assert ppo["forward"] == pytest.approx(4 * ppo["backward"])
    assert rrhf["seconds"] >= 2.0


@pytest.mark.slow
def test_online_rows(tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert table(config(tmp_path, ["start", "rrhf_ip2", "rrhf_op"]), capsys)["ran"] == 3
    ip2, op = (figures(tmp_path / "table", row)["cost"] for row in ("rrhf_ip2", "rrhf_op"))
    assert ip2["sampled"] > op["sampled"] > 0
    assert ip2["backward"] > op["backward"] > op["sampled"]
    assert models(tmp_path / "table") == {"start": 1, "IP-2": 1, "OP-1": 1}


@pytest.mark.parametrize(
    "stage",
    ["training", pytest.param("sampling", marks=pytest.mark.slow), pytest.param("measuring", marks=pytest.mark.slow)],
)
def test_an_interrupted_unit_ends_as_an_undisturbed_one(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    plain = config(tmp_path, ["start", "rrhf_dp"])
    table(plain, capsys)
    cut, interrupt = config(tmp_path, ["start", "rrhf_dp"], "cut"), broken(stage)
    with monkeypatch.context() as patch:
        patch.setattr(unit, *interrupt)
        assert main(["table", "--config", str(cut)]) == 130
    assert not (tmp_path / "cut/seed-1/rrhf_dp/manifest.json").exists()
    assert table(cut, capsys)["ran"] == (2 if stage == "sampling" else 1)
    assert trained == ["rrhf_dp"] * 2  # once each: what was measured is a whole run, and it is not run again
    for row in ("start", "rrhf_dp"):
        one, other = figures(tmp_path / "table", row), figures(tmp_path / "cut", row)
        one["cost"].pop("seconds"), other["cost"].pop("seconds")
        assert one == other


def broken(stage: str) -> tuple[str, Callable[..., Any]]:
    """What to replace in the module of the units, so that a run is interrupted just there."""

    def halfway(folder: Path, *_: Any) -> Any:
        (folder / "work/model").mkdir(parents=True)
        (folder / "work/model/config.json").write_text("half a model")
        raise KeyboardInterrupt

    def never(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    return {
        "sampling": ("score", never),
        "training": ("run_metered", halfway),
        "measuring": ("evaluate_divergence", never),
    }[stage]


def test_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, ["start"])
    with Lock(tmp_path / "table"), pytest.raises(InputError, match="another process"), Lock(tmp_path / "table"):
        pass
    with Lock(tmp_path / "table"):
        assert main(["table", "--config", str(path)]) == 1
    assert "another process is at it" in capsys.readouterr().err


def test_seeds_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes at a time write what one writes; a seed that fails is named, and what was finished stays."""
    one = config(tmp_path, ["start", "best_of"], "one", seeds=[1, 2, 3])
    apart = config(tmp_path, ["start", "best_of"], "apart", seeds=[1, 2, 3])
    answers = tmp_path / "apart" / "seed-2" / "start" / "answers.raw.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("of other settings")
    assert main(["table", "--config", str(apart), "--jobs", "2"]) == 1
    assert "seed 2: " in capsys.readouterr().err
    shutil.rmtree(answers.parent)
    told, again = table(one, capsys), table(apart, capsys, "--jobs", "2")
    assert (told["units"], told["ran"], again["units"]) == (6, 6, 6)
    for seed in (1, 2, 3):
        for row in ("start", "best_of"):
            theirs, ours = (figures(tmp_path / name, row, seed) for name in ("one", "apart"))
            assert ours["held"] == theirs["held"]
            assert ours["threads"] <= theirs["threads"]
    assert " of them, 2 seeds at a time" in (tmp_path / "apart/results.md").read_text()
    assert table(apart, capsys, "--jobs", "3")["ran"] == 0


def test_seeds_end_with_the_table_that_started_them(tmp_path: Path) -> None:
    """However it ends; until they have, they hold its lock."""
    path = config(tmp_path, ["start"], seeds=[1, 2])
    words = [sys.executable, "-m", "rankalign", "table", "--config", str(path), "--jobs", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert process.stderr
    for line in process.stderr:
        if b"== seed" in line:
            break
    process.kill()
    process.wait()
    for _ in range(300):
        with contextlib.suppress(InputError), Lock(tmp_path / "table"):
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the seeds did not end")


def test_what_holds_the_lock_of_a_table_keeps_others_out(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.handle,))
    with pytest.raises(InputError, match="another process"), Lock(tmp_path):
        pass
    child.kill()
    child.wait()
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"jobs": 0}, "give 1 or more"),
        ({"answer": {"temperature": 0.7}}, "temperature must be 1"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"rows": [{"name": "a", "title": "a", "policies": ["drwn"]}]}, "did you mean 'drawn'"),
        ({"rows": [{"name": "a", "title": "a", "kind": "best_of"}]}, "needs a row of kind start"),
        ({"rows": [{"name": "a", "title": "a", "kind": "iterate"}]}, "name its policies"),
        ({"graders": [{"name": "reward", "kind": "length"}]}, "'reward' cannot be a name"),
        ({"graders": [{"name": "../a", "kind": "length"}]}, "'../a' cannot be a name"),
        ({"graders": [{"name": "a", "kind": "length"}] * 2}, "a grader stands twice"),
        ({"graders": [{"name": "a", "kind": "lenght"}]}, "lenght"),
    ],
)
def test_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str) -> None:
    assert main(["table", "--config", str(config(tmp_path, ["start"], **change))]) == 1
    assert said in capsys.readouterr().err


def test_peak_is_the_childs_own(tmp_path: Path) -> None:
    """A child of a large process does not inherit its size."""
    ballast = np.ones(100_000_000)  # 800 MB
    words = [
        sys.executable,
        "-m",
        "rankalign.recipes.paper.metered",
        str(tmp_path / "took.json"),
        "ls",
        "losses",
        "--json",
    ]
    subprocess.run(words, check=True, capture_output=True)
    took = json.loads((tmp_path / "took.json").read_text())
    assert 1e7 < took["peak_bytes"] < ballast.nbytes < peak_bytes()
    assert took["seconds"] > 0


@pytest.mark.slow
def test_killed_for_real(tmp_path: Path) -> None:
    """SIGKILL at any moment; what training leaves behind holds the lock until it ends."""
    flags = {**os.environ, "OMP_NUM_THREADS": "1"}

    def words(path: Path) -> list[str]:
        return [sys.executable, "-m", "rankalign", "table", "--config", str(path), "--json"]

    subprocess.run(words(config(tmp_path, ["start", "rrhf_dp"])), check=True, env=flags, capture_output=True)
    path = config(tmp_path, ["start", "rrhf_dp"], "cut")
    process = subprocess.Popen(words(path), env=flags, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut/seed-1/rrhf_dp/train.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tries = 0
    while (again := subprocess.run(words(path), env=flags, capture_output=True, text=True)).returncode:
        assert "another process is at it" in again.stderr
        assert tries < 100
        tries, _ = tries + 1, time.sleep(1)
    one, other = figures(tmp_path / "table", "rrhf_dp"), figures(tmp_path / "cut", "rrhf_dp")
    assert one["cost"].pop("seconds") > 0
    assert 1e8 < one["cost"].pop("peak_bytes") < 4e9
    assert one["held"] == other["held"]
    assert one["pool"] == other["pool"]
    shutil.rmtree(tmp_path / "cut")
