"""A run that is watched: logs that grow, are cut short, begin late or anew; rounds; samples; the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.evaluation.report.plots import MOST_POINTS
from rankalign.interactive.follow import Follower, Tail, logs_of, read_samples
from rankalign.interactive.terminal import draw


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 1.0 / step, **more}) + "\n"


def add(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as out:
        out.write(text)


def losses(tail: Tail) -> list[tuple[float, float]]:
    return list(zip(*tail.series["loss"], strict=True)) if "loss" in tail.series else []


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    assert not tail.poll()  # not there yet
    whole = line(2)
    add(path, line(1) + whole[:9])
    assert tail.poll()
    assert losses(tail) == [(1.0, 1.0)]
    assert not tail.poll()
    add(path, whole[9:] + '{"step": 3, "loss": "ß')
    assert tail.poll()
    assert losses(tail) == [(1.0, 1.0), (2.0, 0.5)]
    assert (tail.lines, tail.broken, tail.lives) == (2, 0, 1)
    add(path, "\n[1]\nnull\n" + line(4))  # broken ones are counted, not fatal
    assert tail.poll()
    assert [step for step, _ in losses(tail)] == [1, 2, 4]
    assert (tail.lines, tail.broken) == (6, 3)


def test_every_line_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    tail, taken = Tail(path), []
    monkeypatch.setattr(tail, "_take", lambda raw: taken.append(json.loads(raw)["step"]))
    for step in range(1, 400):
        add(path, line(step, note="x" * 50))
        if step % 7 == 0:
            tail.poll()
    tail.poll()
    assert taken == list(range(1, 400))


@pytest.mark.parametrize("how", ["shorter", "longer", "gone", "in place"])
def test_a_run_that_begins_anew_forgets_the_former(tmp_path: Path, how: str) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    add(path, "".join(line(step, grad_norm=9.0) for step in range(1, 30)))
    tail.poll()
    count = {"shorter": 3, "longer": 60}.get(how, 5)
    new = "".join(line(step, kl=0.1) for step in range(1, count + 1))
    if how == "gone":
        path.unlink()
        assert tail.poll()
        assert tail.series == {}
    if how == "in place":
        path.write_text(new)
    else:
        (tmp_path / "other").write_text(new)
        (tmp_path / "other").replace(path)  # as atomic writers do
    assert tail.poll()
    assert [step for step, _ in losses(tail)] == list(range(1, count + 1))
    assert "grad_norm" not in tail.series
    assert tail.lives >= 2


def test_a_file_rewritten_with_the_same_beginning_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    text = ""
    for step in range(1, 200):  # PPO writes its whole log at each step
        text += line(step)
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(path)
        tail.poll()
    assert [step for step, _ in losses(tail)] == list(range(1, 200))
    assert tail.lives == 1


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_run_that_starts_later(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "runs" / "late")
    first = follower.poll()
    state = follower.state()
    assert (state["status"], state["panels"], state["changed"]) == ("waiting", [], None)
    add(tmp_path / "runs" / "late" / "log.jsonl", line(1, epoch=0.5, warnings={"ties": "many"}))
    assert follower.poll() == first + 1
    assert follower.poll() == first + 1
    state = follower.state()
    assert (state["status"], state["step"], state["epoch"]) == ("running", 1, 0.5)
    assert state["warnings"] == [[1, "ties", "many"]]
    (tmp_path / "runs" / "late" / "manifest.json").write_text("{}")
    assert follower.state()["status"] == "finished"


@pytest.mark.parametrize("place", [".", "model", "train"])
def test_the_log_of_each_kind_of_run(tmp_path: Path, place: str) -> None:
    add(tmp_path / place / "log.jsonl", line(1, eval_loss=2.0) + line(2, eval_loss=1.5))
    follower = Follower(tmp_path)
    follower.poll()
    state = follower.state()
    assert [panel["title"] for panel in state["panels"]] == ["Loss"]
    assert {s["name"]: s["points"] for s in state["panels"][0]["series"]} == {
        "loss": [[1, 1], [2, 0.5]], "eval_loss": [[1, 2.0], [2, 1.5]],
    }  # fmt: skip
    assert state["best"].startswith("The best checkpoint is that of step 2: held-out loss 1.5")


def test_rounds_are_one_curve(tmp_path: Path) -> None:
    add(tmp_path / "round-1" / "log.jsonl", line(1, round=1, refreshed_at=0) + line(2, round=1, refreshed_at=0))
    add(tmp_path / "round-2" / "log.jsonl", line(3, round=2, refreshed_at=2) + line(4, round=2, refreshed_at=2))
    add(tmp_path / "round-2" / "model" / "log.jsonl", line(1) + line(2))  # the same, by the round's own steps
    add(tmp_path / "round-10" / "adapter" / "log.jsonl", line(1) + line(2))  # under way
    follower = Follower(tmp_path)
    follower.poll()
    state = follower.state()
    assert [x for x, _ in state["panels"][0]["series"][0]["points"]] == [1, 2, 3, 4, 5, 6]
    assert (state["step"], state["round"]) == (6, 3)
    add(tmp_path / "round-11" / "candidates.jsonl", "")  # the last round trains the run's own model
    add(tmp_path / "model" / "log.jsonl", line(1))
    assert [str(path.relative_to(tmp_path)) for path in logs_of(tmp_path)][-1] == "model/log.jsonl"
    follower.poll()
    assert follower.state()["step"] == 7
    add(tmp_path / "log.jsonl", line(1) + line(2))  # finished: it has all
    assert logs_of(tmp_path) == [tmp_path / "log.jsonl"]


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    count = 4 * MOST_POINTS + 3
    add(tmp_path / "log.jsonl", "".join(line(step) for step in range(1, count + 1)))
    follower = Follower(tmp_path)
    follower.poll()
    points = follower.state()["panels"][0]["series"][0]["points"]
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS
    assert sum(x for x, _ in points) / len(points) == pytest.approx((count + 1) / 2, rel=2e-3)


def test_the_newest_answers(tmp_path: Path) -> None:
    sets = [
        CandidateSet(f"p{k}", f"q{k}", [Response(f"a{k}", scores={"rm": 1.0, "x": None}, finished=False)])
        for k in range(9)
    ]
    records.write(tmp_path / "candidates.jsonl", sets)
    with open(tmp_path / "candidates.jsonl", "a") as out:
        out.write('{"id": "broken\n{"id": "half", "prompt": "q", "resp')
    found = read_samples(tmp_path / "candidates.jsonl")
    assert [sample["id"] for sample in found] == ["p8", "p7", "p6", "p5", "p4"]
    assert found[0]["answers"] == [{"policy": "unknown", "text": "a8", "scores": {"rm": 1.0}, "finished": False}]
    follower = Follower(tmp_path)
    follower.poll()
    assert follower.state()["samples_of"] == "candidates.jsonl"
    assert read_samples(tmp_path / "gone.jsonl") == []


# --- the terminal and the command --------------------------------------------------------------------------------


def test_the_terminal_draws_what_fits_and_names_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("plotext")
    rows = [line(s, grad_norm=2.0, margin=0.5, warnings={"w\x1b[31m": "x\x07"} if s == 3 else {}) for s in range(1, 9)]
    add(tmp_path / "log.jsonl", "".join(rows))
    follower = Follower(tmp_path)
    follower.poll()
    text = draw(follower.state(), 60)
    assert [word for word in ("Loss", "Margin", "Gradient norm") if word in text] == ["Loss", "Margin", "Gradient norm"]
    assert "warning, step 3" in text
    assert not {"\x1b", "\x07"} & set(text)
    assert max(map(len, text.splitlines()[2:])) <= 60
    small = draw(follower.state(), 60, rows=20)
    assert "no room for: Margin, Gradient norm" in small
    assert len(small.splitlines()) <= 20
    assert "\x1b[" in draw(follower.state(), 60, colours=True)


def test_the_command_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotext")
    add(tmp_path / "run" / "log.jsonl", line(1) + line(2))
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 0
    assert "run: running, step 2" in capfd.readouterr().out
    assert main(["watch", str(tmp_path / "run"), "--once", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["step"], found["last"]) == (2, {"loss": 0.5})
    assert main(["watch", str(tmp_path / "absent"), "--once"]) == 1
    assert main(["watch", str(tmp_path / "run" / "log.jsonl")]) == 1
    assert "is a file; give the folder of a run" in capfd.readouterr().err
    assert main(["watch", str(tmp_path)]) == 1
    assert (
        f"holds several runs, and no log of its own; name one of them: '{tmp_path / 'run'}'" in capfd.readouterr().err
    )
