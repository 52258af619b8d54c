"""Sweeps: which runs there are, what they share, what is not repeated, and that each is `rankalign train`'s own run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.errors import InputError, Interrupted
from rankalign.recipes import sweep
from rankalign.recipes.sweep_metric import Metric, last_line, metric_of
from rankalign.storage.jsonl import write_rows


def test_the_grid_is_the_product_with_the_last_flag_fastest() -> None:
    fixed, points = sweep.grid(["--beta", "0.1,0.2", "--loss", "dpo", "--learning_rate=1e-6,2e-6", "--use_lora"])
    assert fixed == {"loss": "dpo", "use_lora": True}
    assert [(p["beta"], p["learning_rate"]) for p in points] == [
        ("0.1", "1e-6"), ("0.1", "2e-6"), ("0.2", "1e-6"), ("0.2", "2e-6"),
    ]  # fmt: skip


def test_values_that_hold_commas_are_given_by_naming_the_flag_again() -> None:
    words = ["--judge", "rm:0.7,vader:0.3", "--judge", "rm", "--loss_options", '{"a": 1, "b": 2}']
    fixed, points = sweep.grid(words)
    assert points == [{"judge": "rm:0.7,vader:0.3"}, {"judge": "rm"}]
    assert fixed == {"loss_options": '{"a": 1, "b": 2}'}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beta 0.1,0.1", "given twice"),
        ("--beta 0.1,,0.2", "a value is empty"),
        ("0.1 --beta", "unexpected argument '0.1'"),
        ("--beta 0.1", "a sweep needs several values"),
        ("--loss rrhf,dpo --beta 0.1", "run loss rrhf: loss 'rrhf' has no option 'beta'"),
        ("--loss dpo --beta 0.1,0.10", "the runs beta 0.1 and beta 0.10 have the same settings"),
        ("--beta 0.1,0.2 --loss dpo --push_to_hub True", "push_to_hub is for one `rankalign train`"),
        ("--loss dpo --beta 0.1,high", "run beta high: the training settings do not fit"),
    ],
)
def test_what_makes_no_sweep_is_refused_before_anything_is_trained(words: str, message: str, tmp_path: Path) -> None:
    more = ["--model", "tiny", "--data", str(pairs(tmp_path))]
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        sweep.plan(None, [*words.split(), *more], tmp_path)


def pairs(folder: Path) -> Path:
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}"} for i in range(8)]
    write_rows(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


class Trainer:
    """`rankalign train` in this process; stops or fails where it is told to."""

    def __init__(self, **at: int) -> None:
        self.at, self.started = at, 0

    def __call__(self, words: list[str]) -> tuple[int, str]:
        self.started += 1
        for code, number in (("stop", self.at.get("stop")), ("fail", self.at.get("fail"))):
            if self.started == number:
                return (130, "") if code == "stop" else (1, "no memory")
        return main(["train", *words, "--json"]), ""


FLAGS = ["--model", "tiny", "--loss", "dpo", "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]


def test_a_stopped_sweep_goes_on_and_its_runs_are_those_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANKALIGN_CACHE", "RANKALIGN_TOKEN_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    data, output = pairs(tmp_path), tmp_path / "sweep"
    words = [*FLAGS, "--data", str(data), "--eval_data", str(data), "--beta", "0.1,0.5", "--learning_rate", "1e-3,1e-2"]

    def plan(*more: str) -> list[sweep.Run]:
        return sweep.plan(None, [*words, *more], output)

    runs = plan()
    metric = metric_of("loss", [run.config for run in runs])
    assert metric.said == "eval_loss (lower is better)"
    with pytest.raises(Interrupted, match="run 3 of 4"):
        sweep.run_all(runs, metric, output, Trainer(stop=3))
    assert [row["status"] for row in json.loads((output / "sweep.json").read_text())["runs"]] == [
        "finished", "finished", "waiting", "waiting",
    ]  # fmt: skip
    said = capsys.readouterr().err
    # Eight pairs that are trained on, measured before and behind it: computed and tokenised once.
    assert re.findall(r"reference: (\d+) responses computed", said) == ["16", "0"]
    assert re.findall(r"tokens: (made|found)", said) == ["made", "found", "found", "found"]
    rest = Trainer()
    done = sweep.run_all(plan(), metric, output, rest)
    assert (rest.started, done["finished"], done["failed"], done["exit_code"]) == (2, 4, 0, 0)

    alone = tmp_path / "alone"
    single = [*FLAGS, "--data", str(data), "--eval_data", str(data), "--beta", "0.5", "--learning_rate", "1e-2"]
    assert main(["train", *single, "--output_dir", str(alone)]) == 0
    last = Path(done["output"]) / done["runs"][3]["run"]
    assert (last / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()

    # The best, by the logs themselves.
    losses = {}
    for row in done["runs"]:
        lines = [json.loads(line) for line in (output / row["run"] / "log.jsonl").read_text().splitlines()]
        losses[row["run"]] = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
        assert row["eval_loss"] == losses[row["run"]]
    assert Path(done["best"]).name == min(losses, key=lambda name: losses[name])

    other = plan("--seed", "7")
    assert not {run.folder for run in other} & {run.folder for run in runs}
    capsys.readouterr()


def test_a_run_that_fails_is_counted_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "start_process", Trainer(fail=1))
    flags = ["--model", "tiny", "--max_steps", "1", "--data", str(pairs(tmp_path)), "--output_dir", str(tmp_path / "s")]
    assert main(["sweep", *flags, "--seed", "1,2", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [(row["status"], row.get("reason")) for row in said["runs"]] == [("failed", "no memory"), ("finished", None)]
    table = (tmp_path / "s" / "sweep.csv").read_text().splitlines()
    assert table[0] == "run,seed,steps,seconds,status"
    assert table[1].endswith("no memory")
    assert not (tmp_path / "s" / "sweep.html").exists()  # of one run there is nothing to compare
    monkeypatch.setattr(sweep, "start_process", Trainer())
    assert main(["sweep", *flags, "--seed", "1,2"]) == 0  # the failed one is tried again
    assert "2 of 2 runs finished, 0 failed" in capsys.readouterr().out
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert all(path.name in page for path in (tmp_path / "s").iterdir() if path.is_dir())


def test_a_list_of_runs_and_what_metric_they_have(tmp_path: Path) -> None:
    listed = tmp_path / "runs.yaml"
    listed.write_text("- {loss: dpo, beta: 0.2}\n- {loss: [dpo, {sft: 0.1}]}\n")
    more = ["--model", "tiny", "--data", str(pairs(tmp_path))]
    runs = sweep.plan(None, more, tmp_path / "out", str(listed))
    assert [run.config.loss for run in runs] == ["dpo", "dpo+0.1*sft"]
    configs = [run.config for run in runs]
    assert metric_of("", configs).name == ""
    assert metric_of("margin", configs) == Metric("margin", True)
    assert metric_of("margin:min", configs) == Metric("margin", False)
    for asked, message in (
        ("eval_loss", "nothing is measured"),
        ("lossy", "did you mean 'loss'"),
        ("loss:up", "max or"),
    ):
        with pytest.raises(InputError, match=message):
            metric_of(asked, configs)


def test_a_process_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, why = sweep.start_process(["--data", "nowhere.jsonl", "--model", "tiny", "--output_dir", str(tmp_path / "o")])
    assert (code, why) == (1, "nowhere.jsonl: no such file (see docs/training.md#what---data-names)")
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", os.fspath(script))
        assert sweep.start_process([]) == (-9, "ended by SIGKILL: out of memory?")


def test_a_run_is_told_to_stop_when_its_sweep_is_killed(tmp_path: Path) -> None:
    script, told = tmp_path / "python", tmp_path / "told"
    lines = (
        "#!/bin/sh",
        f"trap 'echo stop >> {told}; exit' TERM",
        f"echo begun > {told}",
        "while :; do sleep 0.1; done",
    )
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    code = f"import sys; from rankalign.recipes import sweep; sys.executable = {str(script)!r}; sweep.start_process([])"
    killed = subprocess.Popen([sys.executable, "-c", code])
    _until(lambda: told.is_file() and told.read_text() == "begun\n")
    killed.kill()
    killed.wait()
    _until(lambda: told.read_text() == "begun\nstop\n")


def _until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    pytest.fail("it did not come to that")


def test_the_best_checkpoint_counts_where_it_is_what_was_kept(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "eval_loss": 0.4, "eval_margin": 2.0},
        {"step": 2, "eval_loss": 0.3, "eval_margin": 1.0},
        {"step": 3, "eval_loss": 0.5, "eval_margin": 3.0},
    ]
    write_rows(tmp_path / "log.jsonl", lines)
    margin = Metric("eval_margin")
    assert last_line(tmp_path, margin)["eval_margin"] == 3.0
    assert last_line(tmp_path, margin, "eval_loss:min")["eval_margin"] == 1.0
