"""The documentation's own commands and code, page by page, on the tiny model: what it shows is what runs.

A fence named `bash` or `python` is run. A fence without a name shows a form, and runs nothing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.interactive.ranking import Session
from rankalign.losses import LOSSES
from rankalign.models import load as models
from rankalign.storage.jsonl import write_rows

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
FENCE = re.compile(r"^```(bash|sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BROUGHT = re.compile(r'^```python title="([\w.]+)"\n(.*?)^```', re.DOTALL | re.MULTILINE)
"""Files that a page shows and its commands name."""
SLOW = {"chat.md", "generation.md", "iterate.md", "ppo.md"}
"""Pages with commands that take more than some seconds even on the tiny model (two workers of Ray, 80 prompts)."""
ELSEWHERE = {"migrating.md"}
"""Pages whose commands test_ancestor_lines.py runs, with paths in the place of their variables."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the checkout in which a small demo has run, and the files that a reader would bring along."""
    if not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("the scripts use the environment that make builds, and this one is another")
    folder = tmp_path_factory.mktemp("docs")
    for name in ("data_generation", "train_scripts", "eval", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))  # older than the environment, so that make leaves that alone
    (folder / ".venv").symlink_to(ROOT / ".venv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RANKALIGN_DEFAULT_MODEL", str(long_tiny(folder / "default")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
        assert main(["run", "--config", "eval/configs/demo.yaml", "--max_prompts", "6"]) == 0
        bring_files(folder)
        yield folder


def long_tiny(folder: Path) -> Path:
    """The tiny model with room for what a judge is shown; its positions are rotations and need no weights."""
    shutil.copytree(models.resolve("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


def bring_files(folder: Path) -> None:
    """What the pages take for granted that the reader has."""
    for page in PAGES:
        for name, text in BROUGHT.findall((DOCS / page).read_text(encoding="utf-8")):
            (folder / name).write_text(text)
    pairs = [{"id": i, "prompt": "why", "chosen": "yes", "rejected": "no", "subset": "easy"} for i in range(4)]
    write_rows(folder / "pairs.jsonl", pairs)
    demo = folder / "runs" / "demo"
    for name in ("candidates.jsonl", "scored.jsonl", "held_out.jsonl"):
        shutil.copy(demo / "candidates.jsonl", folder / name)
    rank_by_hand(folder / "candidates.jsonl", folder / "labelled.jsonl")
    answers = [Response(p, policy=p, scores={"human": s, "judge": s}) for p, s in (("base", 0.0), ("aligned", 1.0))]
    write(folder / "runs" / "votes.jsonl", [CandidateSet("chat-00001", "Hello", answers)])
    train = ["--model", "tiny", "--data", "scored.jsonl", "--use_lora", "--max_steps", "1", "--output_dir", "runs/lora"]
    assert main(["train", *train]) == 0
    words = [
        "sheet",
        "make",
        str(demo / "before.jsonl"),
        str(demo / "after.jsonl"),
        "--output",
        str(folder / "raters.csv"),
    ]
    assert main(words) == 0
    for rater in ("ann", "bob"):
        fill(folder / "raters.csv", folder / f"{rater}.csv")
    review = {
        "question_id": 1,
        "answer1_id": "a",
        "answer2_id": "b",
        "score": [8.0, 9.0],
        "text": "8 9\nThe second.",
        "metadata": {},
    }
    write_rows(folder / "reviews.jsonl", [review])
    axes = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    graded = [{"prompt": f"why {i}", "response": text, **axes} for i in range(2) for text in ("because", "who knows")]
    write_rows(folder / "helpsteer2.jsonl", graded)


def rank_by_hand(source: Path, output: Path) -> None:
    """Two annotators have ranked everything in the order of the file."""
    for name in ("ann", "bob"):
        with Session(list(read(source)), output, name) as session:
            while session.counts()["left"]:
                shown = session.view()
                order = [[i] for i in range(len(shown["answers"]))]
                session.commit(shown["turn"] + 1, shown["at"], order)
            session.write()


def fill(sheet: Path, filled: Path) -> None:
    """A rater's sheet: every verdict is for the first."""
    with sheet.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    with filled.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows({**row, "verdict": "1"} for row in rows)


def run_shell(block: str) -> None:
    """Each command of a block: ours in this process, which is faster, all others in a shell."""
    for line in block.replace("\\\n", " ").splitlines():
        command, _, target = line.partition(" > ")
        words = shlex.split(command, comments=True)
        if not words:
            continue
        if words[:2] in (["rankalign", "chat"], ["rankalign", "label"]):
            open_and_close(words)
            continue
        if words[0] != "rankalign":
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
            continue
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([os.path.expandvars(word) for word in words[1:]])
        assert code == 0, f"{line}\n{err.getvalue()[-2000:]}"
        if target:
            Path(target.strip()).write_text(out.getvalue())


def open_and_close(words: list[str]) -> None:
    """A command that talks to people: a page is up as soon as it tells its address, a terminal ends with its input."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    if "--repl" not in words:
        lines = iter(process.stderr.readline, "")
        assert any("http://127.0.0.1" in line for line in lines), words
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 130), process.stderr.read()


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the fences of a page that run."""
    return FENCE.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else []) for p in PAGES if blocks(p)]
)
def test_what_a_page_shows_runs(page: str, sandbox: Path) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif page not in ELSEWHERE:
            run_shell(text)


def test_the_page_of_settings_is_that_of_the_classes() -> None:
    from docs import loss_defaults
    from docs.reference import FLAGS_PAGE, PAGE, flags_page, page

    assert FLAGS_PAGE.read_text(encoding="utf-8") == flags_page(), "run `python -m docs.reference`"
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m docs.reference`"
    told = loss_defaults.PAGE.read_text(encoding="utf-8")
    assert told == loss_defaults.page(), "run `python -m docs.loss_defaults`"
    known = {name: loss.defaults for name, loss in LOSSES.items()}
    assert all(keyword in known[name] for name, told in loss_defaults.PUBLISHED.items() for keyword in told)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [str(ROOT / ".venv/bin/mkdocs"), "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:  # nothing is fetched from elsewhere when a page opens
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8"))
        assert [url for url in fetched if "canonical" not in url] == []


def test_every_page_is_in_the_menu() -> None:
    import yaml

    menu = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in PAGES:
        assert page in menu, page


def test_benchmarks_take_the_flags_that_the_page_shows(tmp_path: Path) -> None:
    """They take from minutes to an hour, so what runs here is their reading of the flags, and the smallest of one."""
    shown = re.findall(r"^python -m (benchmarks\.\w+)(.*)$", (DOCS / "performance.md").read_text("utf-8"), re.MULTILINE)
    names = ("train", "scoring", "sampling", "scale", "shares")
    assert {module for module, _ in shown} == {f"benchmarks.{name}" for name in names}
    python = [str(ROOT / ".venv/bin/python"), "-m"]
    for module, flags in shown:
        told = subprocess.run([*python, module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert [flag for flag in re.findall(r"--[\w-]+", flags) if flag not in told] == []
    words = "--model tiny --prompts 2 --prompt-tokens 8 --new-tokens 4 --batch-sizes 2 --rows 4 --beams --repeats 1"
    small = [*python, "benchmarks.sampling", *words.split()]
    table = subprocess.run(small, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "generate, batch 2" in table
    assert "diverse, rows 4" in table
