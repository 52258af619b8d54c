"""Every stage, stopped: it goes on under its own settings and data to an unbroken run's bits, under others never."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.engines import hf
from rankalign.errors import InputError
from rankalign.recipes.paper import unit
from rankalign.recipes.paper.child import Lock
from rankalign.stages import generation
from rankalign.storage.journal import Journal
from rankalign.training.ilql.trainer import settings_of, train_ilql
from rankalign.training.ppo.trainer import PPOTrainer
from rankalign.training.run import StopOnSignal

GRADE = "def grade(samples):\n    return [sum(map(ord, text)) % 97.0 for text in samples]\n"
Content = dict[str, Any]
TRAIN = {
    "use_cpu": True, "disable_tqdm": True, "max_steps": 3, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
}  # fmt: skip
SAMPLER = {"name": "now", "n": 2, "max_new_tokens": 4, "temperature": 1.0}


class Stopped(Exception):
    """Ended by a signal, with what it said."""


def command(name: str, content: Content, folder: Path) -> None:
    """``rankalign NAME --config F``, as a shell would see it.

    Raises:
        Stopped: exit code 130.
        InputError: exit code 1, with the message.
    """
    path, said = folder / f"{name}.yaml", io.StringIO()
    path.write_text(json.dumps(content))  # JSON is YAML
    with contextlib.redirect_stderr(said):
        code = main([name, "--config", str(path)])
    if code == 130:
        raise Stopped(said.getvalue())
    if code:
        raise InputError(said.getvalue())


# --- how each stage is run: (folder, output, settings that differ from the usual ones) --------------------------------


def training(folder: Path, output: Path, more: Content) -> None:
    usual = {"model": "tiny", "data": str(folder / "data.jsonl"), "output_dir": str(output), **TRAIN}
    command("train", {**usual, **more}, folder)


def ppo(folder: Path, output: Path, more: Content) -> None:
    told = {"method": "ppo", "reward": f"{folder}/grade.py:grade", "rollouts": 2, "max_new_tokens": 4, "ppo_epochs": 1}
    training(folder, output, {**told, "save_steps": 1, **more})


def ilql(folder: Path, output: Path, more: Content) -> None:
    """From Python alone. A text of the data file is what it learns from."""
    samples = [(json.loads(line)["prompt"], "yes") for line in (folder / "data.jsonl").read_text().splitlines()]
    told = {"model": "tiny", "output_dir": str(output), "max_steps": 3, "per_device_train_batch_size": 2}
    try:
        train_ilql(samples, [0.0, 1.0, 2.0, 3.0], settings_of({**told, **more}))
    except KeyboardInterrupt:
        raise Stopped from None


def recipe(folder: Path, more: Content) -> Content:
    """What ``run`` and ``iterate`` share."""
    scorer = {"name": "len", "kind": "function", "function": f"{folder}/grade.py:grade"}
    usual = {"prompts": str(folder / "data.jsonl"), "model": "tiny", "judge": "len", "scorers": [scorer]}
    return {**usual, "policies": [SAMPLER], **more, "train": {**TRAIN, **more.get("train", {})}}


def rounds(folder: Path, output: Path, more: Content) -> None:
    command("iterate", {**recipe(folder, more), "output": str(output)}, folder)


def experiment(folder: Path, output: Path, more: Content) -> None:
    answer = {"n": 1, "max_new_tokens": 4}
    rest = {"output": str(output), "heldout": str(folder / "data.jsonl"), "answer": answer}
    command("run", {**rest, **recipe(folder, more)}, folder)


def table(folder: Path, output: Path, more: Content) -> None:
    rows = [{"name": "start", "title": "s", "kind": "start"}, {"name": "rrhf", "title": "r", "policies": ["now"]}]
    content = recipe(folder, more)
    for name in ("judge", "scorers"):
        del content[name]
    rest = {"output": str(output), "heldout": str(folder / "data.jsonl"), "reward": f"{folder}/grade.py:grade"}
    command("table", {**rest, "rows": rows, "seeds": [1], "answer": {"n": 1, "max_new_tokens": 4}, **content}, folder)


def sampling(folder: Path, output: Path, more: Content) -> None:
    usual = {"prompts": str(folder / "data.jsonl"), "output": str(output), "policies": [{**SAMPLER, "model": "tiny"}]}
    command("sample", {**usual, **more}, folder)


def scoring(folder: Path, output: Path, more: Content) -> None:
    scorer = {"name": "len", "kind": "function", "function": f"{folder}/grade.py:grade"}
    usual = {"input": str(folder / "data.jsonl"), "output": str(output), "scorers": [scorer]}
    command("score", {**usual, **more}, folder)


# --- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """How a stage is run, and a setting of it that changes a number.

    Attributes:
        run: see above.
        other: the changed setting.
        said: what the refusal must name.
        usual: settings of every run of the case.
        result: the files that an unbroken run must equal, below the output.
        inputs: whether other data are another run; sampling and scoring keep answers by their record's content.
    """

    run: Callable[[Path, Path, Content], None]
    other: Content
    said: str
    usual: Content = field(default_factory=dict)
    result: str = "*.safetensors"
    inputs: bool = True


STAGES = {
    "rank": Stage(training, {"loss": "simpo"}, 'loss: "dpo" -> "simpo"', {"loss": "dpo"}),
    "sft": Stage(training, {"learning_rate": 1e-6}, "learning_rate: 0.01 -> 1e-06", {"method": "sft"}),
    "reward": Stage(training, {"weight_decay": 0.1}, "weight_decay: 0.0 -> 0.1", {"method": "reward"}),
    "lora": Stage(training, {"lora_r": 4}, "lora_r: 2 -> 4", {"use_lora": True, "lora_r": 2}),
    "ppo": Stage(ppo, {"kl_coef": 0.5}, "kl_coef: null -> 0.5"),
    "ilql": Stage(ilql, {"tau": 0.5}, "tau: 0.7 -> 0.5"),
    "ip": Stage(rounds, {"train": {"loss": "dpo"}}, "train.loss: null", {"rounds": 2}, "model/*.safetensors"),
    "op": Stage(
        rounds, {"kl_coef": 0.5}, "kl_coef: 0.0 -> 0.5", {"rounds": 1, "refresh_every": 1}, "model/*.safetensors"
    ),
    "run": Stage(experiment, {"train": {"beta": 0.7, "loss": "dpo"}}, "train.beta: null", {}, "model/*.safetensors"),
    "table": Stage(table, {"train": {"weight_decay": 0.1}}, "train.weight_decay: null", {}, "seed-1/*/answers.jsonl"),
    "sample": Stage(
        sampling, {"policies": [{**SAMPLER, "model": "tiny", "top_k": 5}]}, "top_k: 0 -> 5", {}, "", inputs=False
    ),
    "score": Stage(scoring, {"scorers": [{"name": "other", "function": "FILE:grade", "kind": "function"}]}, "name",
                   {}, "", inputs=False),
}  # fmt: skip


def put(path: Path, word: str = "it") -> None:
    sizes = [Response("yes " * n, scores={"j": float(n)}) for n in (1, 2, 3)]
    write(path, [CandidateSet(f"p{i}", f"Is {word} {i}?", sizes) for i in range(4)])


def bits(output: Path, pattern: str) -> dict[str, bytes]:
    found = [output] if not pattern else sorted(output.glob(pattern))
    assert found
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


@contextlib.contextmanager
def a_signal_comes(name: str) -> Iterator[None]:
    """Have a signal arrive when a part of the work, and not all, is done."""
    with pytest.MonkeyPatch.context() as patch:
        if name in ("sample", "score"):
            patch.setattr(Journal, "append", _then(Journal.append, _interrupt))
        elif name == "ilql":
            patch.setattr(torch.optim.AdamW, "step", _then(torch.optim.AdamW.step, _interrupt))
        elif name == "ppo":  # whose loop looks for a signal before each step
            patch.setattr(PPOTrainer, "iterate", _then(PPOTrainer.iterate, _terminate))
        else:
            patch.setattr(StopOnSignal, "__init__", _then(StopOnSignal.__init__, _terminate))
        yield


def _then(method: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    def both(*given: Any, **named: Any) -> Any:
        result = method(*given, **named)
        after()
        return result

    return both


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def small_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one prompt, and the table's training in this process, to be quick."""

    def here(folder: Path, name: str, settings: Content, lock: Lock) -> Any:
        out = io.StringIO()
        path = folder / "here.yaml"
        path.write_text(json.dumps(settings))
        with contextlib.redirect_stdout(out):
            code = main([name, "--config", str(path), "--json"])
        if code == 130:
            raise KeyboardInterrupt
        assert code == 0
        return json.loads(out.getvalue()), {"seconds": 2.0, "peak_bytes": 3e9}

    monkeypatch.setattr(unit, "run_metered", here)
    monkeypatch.setattr(hf, "MAX_ROWS", 2)
    monkeypatch.setattr(generation, "SCORE_BATCH", 1)
    monkeypatch.setenv("RANKALIGN_CACHE", os.environ.get("RANKALIGN_CACHE") or str(tmp_path / "cache"))


@pytest.mark.parametrize("name", STAGES)
def test_stopped_then_resumed_or_refused(name: str, tmp_path: Path) -> None:
    stage, data, output = STAGES[name], tmp_path / "data.jsonl", tmp_path / "run"
    other = json.loads(json.dumps(stage.other).replace("FILE", f"{tmp_path}/grade.py"))
    put(data)
    (tmp_path / "grade.py").write_text(GRADE)
    stage.run(tmp_path, tmp_path / "whole", stage.usual)
    with a_signal_comes(name), pytest.raises(Stopped):
        stage.run(tmp_path, output, stage.usual)
    if name != "ilql":  # of which nothing is kept that could go on
        refused(stage, tmp_path, output, other, stage.said)
        changed_files_are_refused(stage, tmp_path, output, name)
    stage.run(tmp_path, output, stage.usual)
    assert bits(output, stage.result) == bits(tmp_path / "whole", stage.result)
    refused(stage, tmp_path, output, other, stage.said)  # finished, it is still that run
    changed_files_are_refused(stage, tmp_path, output, name)


def refused(stage: Stage, folder: Path, output: Path, more: Content, said: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml"}
    with pytest.raises(InputError) as caught:
        stage.run(folder, output, {**stage.usual, **more})
    assert "other settings (" in str(caught.value)
    assert said in str(caught.value)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".yaml"}
    assert {p for p in before | after if before.get(p) != after.get(p)} <= {output.with_name("run.journal")}


def changed_files_are_refused(stage: Stage, folder: Path, output: Path, name: str) -> None:
    """The same settings, and another file behind a name."""
    if stage.inputs:
        put(folder / "data.jsonl", "that")
        refused(stage, folder, output, {}, "prompts" if name == "table" else "sha256")
        put(folder / "data.jsonl")
    if name not in ("rank", "sft", "reward", "lora", "ilql", "sample"):
        (folder / "grade.py").write_text(GRADE.replace("97", "89"))
        refused(stage, folder, output, {}, "sha256")
        (folder / "grade.py").write_text(GRADE)


@pytest.mark.parametrize("method", ["rank", "sft", "reward"])
def test_weights_alone_are_no_checkpoint_to_go_on_from(method: str, tmp_path: Path) -> None:
    put(tmp_path / "data.jsonl")
    settings = {"method": method, "save_only_model": True}
    with a_signal_comes(method), pytest.raises(Stopped, match="cannot go on from its checkpoints"):
        training(tmp_path, tmp_path / "run", settings)
    for again in (True, False):
        with pytest.raises(InputError, match="no optimiser to go on with"):
            training(tmp_path, tmp_path / "run", {**settings, "save_only_model": again})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank", "sft", "reward", "ppo", "ip", "op", "run"])
def test_killed_in_a_shell(name: str, tmp_path: Path) -> None:
    """``python -m rankalign``, kill -9 at a checkpoint: other settings are refused, the same end as an unbroken run."""
    stage, output = STAGES[name], tmp_path / "run"
    put(tmp_path / "data.jsonl")
    (tmp_path / "grade.py").write_text(GRADE)
    long = {"max_steps": 40, "save_steps": 1}
    usual = {**stage.usual, **({"train": long} if name in ("ip", "op", "run") else long)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "command", _in_a_shell)
        stage.run(tmp_path, tmp_path / "whole", usual)
        patch.setitem(globals(), "command", functools.partial(_in_a_shell, killed_below=output))
        with pytest.raises(Stopped):
            stage.run(tmp_path, output, usual)
        patch.setitem(globals(), "command", _in_a_shell)
        more = {**usual, **stage.other}
        if "train" in stage.other:
            more["train"] = {**long, **stage.other["train"]}
        with pytest.raises(InputError, match=re.escape(stage.said)):
            stage.run(tmp_path, output, more)
        stage.run(tmp_path, output, usual)
    assert bits(output, stage.result) == bits(tmp_path / "whole", stage.result)


def _in_a_shell(name: str, content: Content, folder: Path, killed_below: Path | None = None) -> None:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    with (folder / "said").open("w+") as said:
        words = [sys.executable, "-m", "rankalign", name, "--config", str(path)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
        while killed_below and process.poll() is None:
            if len(list(killed_below.rglob("checkpoint-[1-9]*"))) > 1:
                process.kill()
                process.wait()
                raise Stopped
            time.sleep(0.01)
        code = process.wait()
        said.seek(0)
        if code:
            raise InputError(said.read())
