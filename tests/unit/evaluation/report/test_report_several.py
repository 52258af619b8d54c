"""Several runs on one page: settings that differ, what came out, curves over each other, and what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankalign.cli import main
from rankalign.data import records
from rankalign.errors import InputError
from rankalign.evaluation.report import plots, several
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.storage import manifest
from rankalign.storage.jsonl import write_rows
from tests.unit.evaluation.report.test_report import HOSTILE, Page, held_out

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def make(folder: Path, gains: list[float], settings: dict[str, Any], steps: int = 9) -> Path:
    """A trained run whose answers gained so much, with a log whose loss falls by the step."""
    base = np.random.default_rng(0).normal(size=len(gains))
    texts = [f"An answer of its own to question {i}" for i in range(len(gains))]
    records.write(folder / "before.jsonl", held_out(texts, base.tolist(), "start"))
    records.write(folder / "after.jsonl", held_out(texts, (base + gains).tolist(), "trained"))
    log = [{"step": s, "loss": 3.0 / s, "ranking_accuracy": 0.5 + s / 20} for s in range(1, steps + 1)]
    write_rows(folder / "log.jsonl", log)
    manifest.write(folder, "train", {"output_dir": str(folder), "seed": 0, **settings}, [], [folder / "log.jsonl"])
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    up = [1.0] * 8 + [-0.5] * 4
    nested = {"train": {"lr": 1}, "policies": [{"name": "a", "n": 1}]}
    other = {"train": {"lr": 1}, "policies": [{"name": "a", "n": 4}]}
    return [
        make(tmp_path / "one", up, {"loss": "dpo", "learning_rate": 1e-6, **nested}),
        make(tmp_path / "two" / "x", [2 * g for g in up], {"loss": "dpo", "learning_rate": 5e-6, "beta": 0.1, **other}),
        make(
            tmp_path / HOSTILE[0].replace("/", "|"), [0.0] * 12, {"loss": HOSTILE[2], "learning_rate": 1e-6, **nested}
        ),
    ]


def compared(folders: list[Path]) -> list[several.Compared]:
    return [several._compared(path.name, read_run(path), path) for path in folders]


def test_the_settings_that_differ_and_no_others(folders: list[Path]) -> None:
    table = several.settings_table(compared(folders))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows == {
        "beta": [None, "0.1", None],
        "learning_rate": ["1e-06", "5e-06", "1e-06"],
        "loss": ["dpo", "dpo", HOSTILE[2]],
        "policies[0].n": ["1", "4", "1"],
    }
    assert table.note.startswith("3 other settings")  # seed, train.lr and the policy's name


def test_what_came_out_by_hand(folders: list[Path]) -> None:
    runs = compared(folders)
    rows = several.outcome_table(runs).rows
    assert [row[1] for row in rows] == ["+0.5", "+1", "+0"]
    assert [row[3] for row in rows] == ["66.7 %", "66.7 %", "50.0 %"]
    duel = several.duel_table(runs)
    # Twice the gain: better where it rose, worse where it fell.
    assert duel.rows[0][:5] == ["x", 8, 0, 4, "66.7 %"]
    assert duel.rows[0][6] == "+0.5"
    ends = several.ends_table(runs)
    assert ends.columns == ["", "steps", "loss", "ranking accuracy", "best at step", "warnings"]
    assert ends.rows[0][1:] == [9, pytest.approx(1 / 3), 0.95, None, 0]


def test_the_page_draws_each_run_once_and_stays_inert(folders: list[Path], tmp_path: Path) -> None:
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.texts["h2"] == ["Outcome", "Settings", "Curves"]
    assert page.texts["h3"] == ["Loss", "Ranking accuracy"]
    assert html.count("<svg") == 2
    for colour in ("--after", "--before", "--third"):
        assert len(re.findall(rf'stroke="var\({colour}\)"', html)) == 2  # one line in each figure
    assert "<img" not in html
    assert html.count("<script>") == 1
    assert all("style" not in attrs and "src" not in attrs for _, attrs in page.tags)
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_the_page_lies_where_the_runs_lie(folders: list[Path], tmp_path: Path) -> None:
    assert several.write_comparison(folders[:2]) == tmp_path.resolve() / "runs.html"


def test_what_is_missing_is_said(folders: list[Path], tmp_path: Path) -> None:
    bare, begun = tmp_path / "bare", tmp_path / "begun"
    bare.mkdir()
    begun.mkdir()
    (bare / "result.json").write_text(json.dumps({"difference": 0.1, "ci95": [0, 0.2], "judge": "other"}))
    (begun / "settings.json").write_text(json.dumps({"loss": "ipo"}))
    write_rows(begun / "log.jsonl", [{"step": 1, "loss": 1.0}])
    shutil.copytree(folders[0], tmp_path / "cut")
    records.write(tmp_path / "cut" / "after.jsonl", held_out(["x"] * 3, [0.0] * 3, "trained"))
    records.write(tmp_path / "cut" / "before.jsonl", held_out(["x"] * 3, [0.0] * 3, "start"))
    said = "\n".join(several.notes(compared([folders[0], bare, begun, tmp_path / "cut"])))
    assert "bare: no manifest and no settings.json" in said
    assert "bare: no log.jsonl" in said
    assert "begun: no held-out result" in said
    assert "The judges differ (other, rm)" in said
    assert "cut: other held-out prompts than one" in said
    assert several.settings_of(read_run(begun), begun) == {"loss": "ipo"}


def test_refusals(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="is named twice"):
        several.write_comparison([folders[0], folders[1], tmp_path / "two" / ".." / "one"])
    (tmp_path / "empty").mkdir()
    assert main(["report", str(folders[0]), str(tmp_path / "empty")]) == 1
    assert "empty: holds no result.json" in capsys.readouterr().err


def test_names_are_as_short_as_they_can_be() -> None:
    assert several.short_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert several.short_names([Path("/r/a/model"), Path("/r/b/model")]) == ["a/model", "b/model"]


def test_more_runs_than_can_be_told_apart() -> None:
    looks = [plots.style(index) for index in range(plots.MOST_RUNS)]
    assert len(set(looks)) == plots.MOST_RUNS == 18
    assert plots.style(plots.MOST_RUNS) is None
    many = [several.Compared(f"r{k}", Run(f"r{k}", log=[{"step": 1, "loss": float(k)}])) for k in range(20)]
    html = several.render(many)
    assert "The first 18 runs are drawn" in html
    assert "Settings of 0 of these runs are known" in html
