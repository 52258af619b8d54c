"""The runs behind the pictures of ``docs/report.md``: what the page says of them is what their pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import gallery
from rankalign.evaluation.report.hack import find_hacks
from rankalign.evaluation.report.runs import read_run
from rankalign.evaluation.report.summary import headline

PAGE = (gallery.GALLERY.parent / "report.md").read_text(encoding="utf-8")
NAMES = ("gain", "doubt", "unclear", "phone", "several")


def test_the_page_quotes_the_reports_it_shows(tmp_path: Path) -> None:
    tones = []
    for folder in gallery.make_runs(tmp_path):
        run = read_run(folder)
        found = headline(run, find_hacks(run.before, run.after, run.judge))
        assert found is not None
        tones.append(found.tone)
        assert f"*{found.lead}*" in " ".join(PAGE.split())
    assert tones == ["good", "doubt", "unclear"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_there_small_and_shown(name: str) -> None:
    assert f"](gallery/{name}.png)" in PAGE
    assert (gallery.GALLERY / f"{name}.png").stat().st_size < 60_000
