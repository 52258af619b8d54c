"""The launcher inside: one command starts the processes, and the script for SLURM is one that a shell reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.recipes.launch import slurm_script
from tests.e2e.distributed import furthest, write_data


def train(data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = [
        "--model",
        "tiny",
        "--data",
        str(data),
        "--output_dir",
        str(output),
        "--max_steps",
        "3",
        "--use_cpu",
        "True",
    ]
    command = [sys.executable, "-m", "rankalign", "train", *flags, "--learning_rate", "1e-3", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl", prompts=8)
    batch = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps")
    one = train(data, tmp_path / "one", *batch, "4")
    two = train(data, tmp_path / "two", "--num_processes", "2", "--launch", "ddp", "--json", *batch, "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr[-2000:]
    assert "starting: " in two.stderr
    assert json.loads(two.stdout)["steps"] == 3  # told once, by the first process
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5


OWN = """
import torch


def mine(ranked, *, beta=0.1):
    gain = torch.where(ranked.mask, ranked.logps - ranked.ref_logps, 0)
    gaps = torch.nn.functional.softplus(beta * (gain.unsqueeze(1) - gain.unsqueeze(2)))
    return torch.where(ranked.pairs, gaps, 0).sum((1, 2)) / ranked.pairs.sum((1, 2)).clamp(min=1)
"""


@pytest.mark.slow  # tests/unit/training/test_own_loss.py has one process
def test_a_loss_in_a_file_trains_on_two_processes_as_on_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    data = write_data(tmp_path / "data.jsonl", prompts=8)
    loss = ("--loss", f"{tmp_path}/mine.py:mine", "--beta", "0.5", "--per_device_train_batch_size", "1")
    one = train(data, tmp_path / "one", *loss, "--gradient_accumulation_steps", "4")
    two = train(
        data, tmp_path / "two", *loss, "--gradient_accumulation_steps", "2", "--num_processes", "2", "--launch", "ddp"
    )
    assert (one.returncode, two.returncode) == (0, 0), two.stderr[-2000:]
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launch", "fsdp"], "did you mean 'fsdp2'"),
        (["--launch", "ddp"], "say --num_processes N"),
        (["--num_processes", "2", "--launch", "fsdp2"], "accelerate has no FSDP for CPUs"),
        (["--num_processes", "-1"], "--num_processes -1 makes no sense"),
        (["--launch", "slurm"], "the GPUs of a node"),
        (["--launch", "slurm:x", "--num_processes", "8"], "--launch slurm:x: unknown"),
    ],
)
def test_what_cannot_be_started_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["train", *words]) == 1
    assert message in capsys.readouterr().err


def test_the_script_says_the_words_as_they_were_typed(tmp_path: Path) -> None:
    """srun, scontrol and accelerate are stood in for by echoes; what reaches accelerate is compared."""
    words = ["--data", "a b.jsonl", "--loss_options", '{"beta": 0.1}', "--system", "it's $HOME \\n"]
    script = tmp_path / "train.slurm"
    script.write_text(slurm_script("zero3", 4, words))
    for name, body in {
        "scontrol": "echo node1; echo node2",
        "srun": 'SLURM_NODEID=1 "$@"',
        "accelerate": f'{sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told[told.index("train") + 1 :] == words
    assert told[told.index("--num_processes") + 1] == "8"
    assert told[told.index("--machine_rank") + 1] == "1"
    assert told[told.index("--main_process_ip") + 1] == "node1"
    assert Path(told[told.index("--config_file") + 1]).name == "zero3.yaml"
