"""The ledger: its measures against definitions, its file over a resume, and planted wrong labels at the top."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.report import hard_examples as analysis
from rankalign.losses.ranked import Ranked
from rankalign.scorers.aggregate import kendall_tau
from rankalign.storage.jsonl import write_rows
from rankalign.training import run as run_module
from rankalign.training.arguments import parse_settings
from rankalign.training.ledger import Ledger, measure
from rankalign.training.run import train


def ranked(logps: list[list[float]], scores: list[list[float]]) -> Ranked:
    """Ragged lists, padded with values that would show if they were read."""
    width = max(map(len, logps))
    fill = [[*row, *[99.0] * (width - len(row))] for row in logps]
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in logps])
    padded = torch.tensor([[*row, *[-50.0] * (width - len(row))] for row in scores])
    return Ranked(logps=torch.tensor(fill), lengths=torch.ones_like(mask, dtype=torch.long), scores=padded, mask=mask)


# --- measures ----------------------------------------------------------------------------------------------------


def test_measures_of_a_hand_case() -> None:
    # scores 3 1 3 2: best are the first and third, worst the second. Of the five strict pairs by score, the model has
    # (1,2) (3,2) (4,2) right and (1,4), (3,4) wrong; its values are all different, so tau-b = (3 - 2) / sqrt(6 * 5).
    found = measure(*hand([[-1.0, -3.0, -1.5, -0.5]], [[3.0, 1.0, 3.0, 2.0]]))
    assert found.best.item() == pytest.approx(-1.25)
    assert found.worst.item() == pytest.approx(-3.0)
    assert found.tau.item() == pytest.approx(1 / math.sqrt(30))


def hand(values: list[list[float]], scores: list[list[float]]) -> tuple[Ranked, torch.Tensor]:
    lists = ranked(values, scores)
    return lists, lists.logps


def test_tau_is_that_of_the_definition_and_of_scipy() -> None:
    rng = np.random.default_rng(0)
    values = [list(map(float, rng.integers(0, 5, size=n))) for n in rng.integers(1, 8, size=40)]
    scores = [list(map(float, rng.integers(0, 4, size=len(row)))) for row in values]
    found = measure(*hand(values, scores)).tau.tolist()
    expected = [kendall_tau(a, b) for a, b in zip(values, scores, strict=True)]
    assert sum(value is None for value in expected) > 2  # lists of one and lists of ties are among them
    for value, wanted in zip(found, expected, strict=True):
        assert math.isnan(value) if wanted is None else value == pytest.approx(wanted, abs=1e-12)
    stats = pytest.importorskip("scipy.stats")
    for value, a, b in zip(found, values, scores, strict=True):
        if not math.isnan(value):
            assert value == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


def test_entries_have_no_number_that_is_not_finite() -> None:
    book = Ledger()
    book.add(["a"], torch.tensor([1.0]), measure(*hand([[-1.0]], [[2.0]])))
    expected = {"id": "a", "epoch": 1, "step": 1, "loss": 1.0, "best": -1.0, "worst": -1.0, "margin": 0.0, "tau": None}
    assert list(book.entries.values()) == [expected]


# --- the file ----------------------------------------------------------------------------------------------------


def letters(count: int, flipped: set[int], seed: int = 1) -> list[CandidateSet]:
    """Strings of 0, 3, 7 and 10 letters among digits, scored by them; a flipped record has its scores negated."""
    rng = random.Random(seed)
    sets = []
    for i in range(count):
        texts = ["".join(rng.choices("abcd", k=k) + rng.choices("1234", k=10 - k)) for k in (0, 3, 7, 10)]
        sign = -1 if i in flipped else 1
        responses = [Response(text, scores={"j": sign * sum(map(str.isalpha, text)) / 10}) for text in texts]
        sets.append(CandidateSet(f"p{i}", f"string {i} please", responses))
    return sets


def settings(source: Path, output: Path, **more: Any) -> Any:
    fixed = {"model": "tiny", "data": str(source), "output_dir": str(output), "use_cpu": True, "disable_tqdm": True}
    fixed |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    return parse_settings({**fixed, "num_train_epochs": 2, "learning_rate": 1e-2, **more})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def flips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A run over 40 examples of which 4 are labelled the wrong way round."""
    folder, wrong = tmp_path_factory.mktemp("flips"), {3, 11, 24, 37}
    write(folder / "data.jsonl", letters(40, wrong))
    train(settings(folder / "data.jsonl", folder / "run", num_train_epochs=3, save_steps=1000))
    return folder / "run", {f"p{i}" for i in wrong}


def test_every_example_has_an_entry_an_epoch_that_agrees_with_the_log(flips: tuple[Path, set[str]]) -> None:
    rows = rows_of(flips[0])
    assert sorted((row["id"], row["epoch"]) for row in rows) == sorted(
        (f"p{i}", e) for i in range(40) for e in range(1, 4)
    )
    log = [json.loads(line) for line in (flips[0] / "log.jsonl").read_text().splitlines()]
    for line in (line for line in log if "loss" in line):
        own = [row for row in rows if row["step"] == line["step"]]
        assert len(own) == 4
        assert sum(row["loss"] for row in own) / 4 == pytest.approx(line["loss"], rel=1e-6)
        assert sum(row["best"] for row in own) / 4 == pytest.approx(line["best_logp"], rel=1e-6)


def test_planted_flips_lead_the_probably_mislabelled(flips: tuple[Path, set[str]]) -> None:
    found = analysis.read_ledger(flips[0])
    assert {example.id for example in found.mislabelled} == flips[1]
    assert {example.id for example in found.hardest[:4]} == flips[1]
    assert found.taus[3] > found.taus[1]


def test_a_resumed_ledger_is_that_of_an_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data.jsonl", letters(10, set()))
    train(settings(tmp_path / "data.jsonl", tmp_path / "whole"))
    real = run_module.JsonlLog.on_log

    class Killed(BaseException):
        pass

    def killing(self: Any, args: Any, state: Any, control: Any, **kw: Any) -> None:
        real(self, args, state, control, **kw)
        if state.global_step == 5:
            raise Killed

    monkeypatch.setattr(run_module.JsonlLog, "on_log", killing)
    with pytest.raises(Killed):
        train(settings(tmp_path / "data.jsonl", tmp_path / "cut"))
    monkeypatch.undo()
    assert {row["step"] for row in rows_of(tmp_path / "cut")} == {1, 2, 3}  # as of the checkpoint at step 3
    late = {"id": "p0", "epoch": 2, "step": 5, "loss": 0.0, "best": 0.0, "worst": 0.0, "margin": 0.0, "tau": None}
    write_rows(tmp_path / "cut" / "ledger.jsonl", [*rows_of(tmp_path / "cut"), {**late, "id": "behind the checkpoint"}])
    train(settings(tmp_path / "data.jsonl", tmp_path / "cut"))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert len(rows_of(tmp_path / "whole")) == 20


# --- analysis ----------------------------------------------------------------------------------------------------


def entry(ident: str, epoch: int, loss: float, margin: float | None, tau: float | None) -> analysis.Entry:
    return analysis.Entry(ident, epoch, loss, margin, tau)


def test_findings_of_a_hand_case() -> None:
    entries = [
        entry("easy", 1, 2.0, 0.5, 1.0), entry("easy", 2, 1.0, 1.5, 1.0),
        entry("wrong", 2, 5.0, -3.0, -1.0), entry("wrong", 1, 4.0, -1.0, -0.5),
        entry("hard", 1, 3.0, -1.0, -0.2), entry("hard", 2, 6.0, 0.8, 0.6),
        entry("alone", 1, 0.5, 0.0, None),
    ]  # fmt: skip
    found = analysis.analyse(entries)
    assert found.losses == {1: pytest.approx(9.5 / 4), 2: pytest.approx(4.0)}
    assert found.taus == {1: pytest.approx(0.1), 2: pytest.approx(0.2)}
    assert [example.id for example in found.hardest] == ["hard", "wrong", "easy", "alone"]
    assert [(e.id, e.margin, e.tau) for e in found.mislabelled] == [("wrong", -2.0, -0.75)]
    assert found.as_dict()["suspects"] == 1
    assert found.tables()[0].rows == [["wrong", 4.0, 5.0, -2.0, -0.75, 2]]


def test_what_is_no_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no ledger\.jsonl"):
        analysis.read_ledger(tmp_path)
    (tmp_path / "ledger.jsonl").write_text('{"id": "a", "epoch": 1, "loss": "high"}\n')
    with pytest.raises(RecordError, match="loss"):
        analysis.read_ledger(tmp_path)


def test_the_command_lists_suspects(flips: tuple[Path, set[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "ledger", str(flips[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["suspects"], len(found["epochs"])) == (40, 4, 3)
    assert main(["eval", "ledger", str(flips[0])]) == 0
    assert "Probably mislabelled" in capsys.readouterr().out
