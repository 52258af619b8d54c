"""Pictures of reports for ``docs/report.md``: runs made up from a seed, their pages, and what a browser shows of them.

``python -m docs.gallery`` writes ``docs/gallery/*.png``; it needs Chromium, and is no part of the site's build.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.evaluation.report.page import write_report
from rankalign.evaluation.report.several import write_comparison
from rankalign.storage import manifest
from rankalign.storage.jsonl import write_rows

GALLERY = Path(__file__).parent / "gallery"
PROMPTS = Path(__file__).parents[1] / "data_generation" / "demo" / "heldout.jsonl"
COLOURS = 128  # of a picture's palette, which keeps it small
OPENERS = (
    "That is a pity", "What a day", "I can see why that stings", "It happens to the best of us", "Oh no",
    "That would have annoyed me as well", "A small thing, and still", "You did what you could", "Not your day",
)  # fmt: skip
KIND = (
    "I am glad nobody was hurt", "let me help you", "tomorrow is a fresh start", "you handled it well",
    "it makes a good story", "have some tea first", "call me tonight", "we can laugh about it soon",
)  # fmt: skip
DRY = (
    "please fill in the form", "that is how it goes", "the shop opens at nine", "there is nothing to be done",
    "you should have checked", "others have it worse", "ask somebody else", "I have work to do",
)  # fmt: skip


def answers(count: int, endings: Sequence[str], seed: int) -> list[str]:
    """Short replies, each of an opener and two endings."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first, second = rng.choice(len(endings), 2, replace=False)
        found.append(f"{OPENERS[rng.integers(len(OPENERS))]}; {endings[first]}, and {endings[second]}.")
    return found


def make_run(folder: Path, count: int, gain: float, after: list[str], rate: float, trend: float) -> Path:
    """A run of ``count`` held-out prompts whose scores rose by ``gain`` on average, and a log of 120 steps.

    Args:
        folder: of the run.
        count: held-out prompts.
        gain: mean rise of the score.
        after: the trained model's answers.
        rate: its learning rate.
        trend: how fast the loss falls.
    """
    rng = np.random.default_rng(sum(folder.name.encode()))
    prompts = [record.prompt for record in records.read(PROMPTS)][:count]
    old = rng.normal(0.2, 0.3, count)
    new = old + gain + rng.normal(0, 0.4, count)
    sides = {"before": (answers(count, DRY, 1), old), "after": (after, new)}
    for name, (texts, scores) in sides.items():
        rows = zip(prompts, texts, scores.round(3), strict=True)
        sets = [
            CandidateSet(f"p{k:02d}", prompt, [Response(text, name, scores={"kindness": float(score)})])
            for k, (prompt, text, score) in enumerate(rows)
        ]
        records.write(folder / f"{name}.jsonl", sets)
    log = []
    for step in range(1, 121):
        learned = 1 - np.exp(-trend * step / 40)
        line = {"step": step, "loss": 0.69 - 0.4 * learned + rng.normal(0, 0.02), "grad_norm": 1 + rng.gamma(2, 0.1)}
        line["ranking_accuracy"] = 0.5 + 0.35 * learned + rng.normal(0, 0.02)
        if step % 20 == 0:
            line["eval_ranking_accuracy"] = 0.5 + 0.3 * learned - 0.1 * max(trend * step / 120 - 1.2, 0)
        log.append(line)
    write_rows(folder / "log.jsonl", log)
    settings = {"loss": "dpo", "beta": 0.1, "learning_rate": rate, "num_train_epochs": 3, "seed": 0}
    manifest.write(folder, "train", settings, [], [folder / "log.jsonl"])
    return folder


def make_runs(root: Path) -> list[Path]:
    """A clear gain, a gain with bad habits, and one that too few prompts show."""
    echo = [f"I am so so sorry, so so sorry, I am so so sorry! {text}" for text in answers(64, KIND[:3], 4)]
    return [
        make_run(root / "gain", 64, 0.35, answers(64, KIND, 2), 1e-6, 1.0),
        make_run(root / "doubt", 64, 0.55, echo, 5e-6, 2.5),
        make_run(root / "unclear", 20, -0.02, answers(20, DRY, 3), 1e-7, 0.2),
    ]


def shoot(browser: object, page: Path, name: str, size: tuple[int, int]) -> None:
    """A picture of the top of a page, in few colours."""
    from PIL import Image

    width, height = size
    opened = browser.new_page(viewport={"width": width, "height": height})  # type: ignore[attr-defined]
    opened.goto(page.as_uri())
    target = GALLERY / f"{name}.png"
    opened.screenshot(path=target)
    opened.close()
    Image.open(target).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


def main() -> None:
    """Make the runs and their pages, and take the pictures."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs.gallery: no Chromium here")
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        runs = make_runs(Path(folder))
        chromium = tools.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for run in runs:
            shoot(chromium, write_report(run), run.name, (900, 620))
        shoot(chromium, runs[1] / "report.html", "phone", (390, 760))
        shoot(chromium, write_comparison(runs), "several", (900, 900))
        chromium.close()


if __name__ == "__main__":
    main()
