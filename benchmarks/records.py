"""Synthetic records, and the stages that read and write records, for :mod:`benchmarks.scale`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.stage import Stage, python, rankalign

ANSWERS, WORDS = 6, 120
# Words of which texts are slices; with 2 million of them a pair of words is as often new as in text of that length.
POOL = 2_000_000


def texts(seed: int) -> Iterator[str]:
    """Endless texts of about :data:`WORDS` words; few words are frequent and most are rare, as in any language."""
    draw = random.Random(seed)
    known = [f"{draw.choice('bdfglmnprst')}{draw.choice('aeiou')}{number:x}" for number in range(50_000)]
    weights = [1 / (rank + 3) for rank in range(len(known))]
    pool = " ".join(draw.choices(known, weights, k=POOL))
    size = len(pool) // POOL * WORDS
    while True:
        start = pool.index(" ", draw.randrange(len(pool) - 2 * size)) + 1
        yield pool[start : pool.index(" ", start + size)] + "."


def records(count: int, answers: int, seed: int, policy: str = "") -> Iterator[dict[str, Any]]:
    text, draw = texts(seed), random.Random(seed + 1)
    asked = texts(0)
    for number in range(count):
        scored = [
            {"text": next(text), "policy": policy or f"model-{k}", "finished": True, "scores": {"rm": draw.gauss(0, 1)}}
            for k in range(answers)
        ]
        yield {"id": f"synthetic-{number:08d}", "prompt": next(asked)[:200], "responses": scored}


def make(folder: Path, count: int) -> None:
    """The files of one size: six answers a prompt as records and as RRHF rows, and two systems' single answers."""
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "candidates.jsonl", "w") as ours, open(folder / "rrhf.jsonl", "w") as theirs:
        for row in records(count, ANSWERS, 1):
            ours.write(json.dumps(row) + "\n")
            answers = [response["text"] for response in row["responses"]]
            scores = [response["scores"]["rm"] for response in row["responses"]]
            theirs.write(json.dumps({"query": row["prompt"], "responses": answers, "scores": scores}) + "\n")
    for name, seed in (("before", 2), ("after", 3)):
        with open(run / f"{name}.jsonl", "w") as out:
            for row in records(count, 1, seed, name):
                out.write(json.dumps(row) + "\n")
    (folder / "length.py").write_text("def length(samples, outputs):\n    return [len(text) for text in outputs]\n")
    scorer = {"name": "length", "kind": "function", "function": str(folder / "length.py") + ":length"}
    for name in ("whole", "part"):
        config = {"input": str(run / "candidates.jsonl"), "output": str(folder / f"{name}.jsonl"), "scorers": [scorer]}
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML


def _score(folder: Path, name: str, *more: str) -> list[str]:
    return rankalign("score", "--config", str(folder / f"{name}.yaml"), *more)


def _eval(kind: str) -> Any:
    return lambda folder: rankalign("eval", kind, str(folder / "run" / "candidates.jsonl"), "--json")


def fill_journal(folder: Path, count: int) -> None:
    """A journal of so many items of six scores each."""
    from rankalign.storage.journal import Journal

    path = folder / "resume.journal"
    path.unlink(missing_ok=True)
    with Journal(path, {}) as journal:
        for start in range(0, count, 1000):
            numbers = range(start, min(start + 1000, count))
            journal.append((("rm", f"synthetic-{k:08d}", f"{k:016x}"), [k / 7] * ANSWERS) for k in numbers)


def open_journal(folder: Path) -> None:
    from rankalign.storage.journal import Journal

    with Journal(folder / "resume.journal", {}) as journal:
        print(len(journal.done), journal.done["rm", "synthetic-00000007", f"{7:016x}"])


def _own(word: str, *more: str) -> list[str]:
    return python("-m", "benchmarks.records", word, *more)


SCORED = ("whole.jsonl", "whole.jsonl.manifest.json", "whole.jsonl.journal")
PARTS = tuple(
    f"part.jsonl{part}{ending}"
    for part in ("", ".shard-0-of-2", ".shard-1-of-2")
    for ending in ("", ".manifest.json", ".journal")
)

STAGES: dict[str, Stage] = {
    "convert-in": Stage(
        "convert, RRHF rows to records",
        lambda f: rankalign("convert", str(f / "rrhf.jsonl"), str(f / "in.jsonl"), "--from", "rrhf"),
    ),
    "convert": Stage(
        "convert, records to records",
        lambda f: rankalign("convert", str(f / "run" / "candidates.jsonl"), str(f / "again.jsonl")),
    ),
    "convert-out": Stage(
        "convert, records to TRL pairs",
        lambda f: rankalign(
            "convert", str(f / "run" / "candidates.jsonl"), str(f / "trl.jsonl"), "--to", "trl", "--pairs", "best-worst"
        ),
        note="the best and the worst of six",
    ),
    "lint": Stage("lint", lambda f: rankalign("lint", str(f / "run" / "candidates.jsonl"), "--json")),
    "score": Stage("score with a function", lambda f: _score(f, "whole"), stale=SCORED),
    "score-again": Stage("the same again, finished: nothing to do", lambda f: _score(f, "whole")),
    "merge": Stage(
        "merge of two shards of a score",
        lambda f: rankalign("merge", str(f / "part.jsonl")),
        lambda f: [_score(f, "part", "--shard", "0/2"), _score(f, "part", "--shard", "1/2")],
        PARTS,
    ),
    "verify": Stage("verify", lambda f: rankalign("verify", str(f / "whole.jsonl"))),
    "diff": Stage("diff", lambda f: rankalign("diff", str(f / "whole.jsonl"), str(f / "part.jsonl"))),
    "reward": Stage("eval reward", _eval("reward")),
    "lexical": Stage("eval lexical", _eval("lexical")),
    "variety": Stage("eval variety", _eval("variety"), most=10**5),
    "sheet": Stage(
        "sheet make",
        lambda f: rankalign(
            "sheet", "make", *(str(f / "run" / f"{n}.jsonl") for n in ("before", "after")), "--output", str(f / "s.csv")
        ),
        note="one answer a prompt",
    ),
    "compare": Stage(
        "compare by score",
        lambda f: rankalign("compare", *(str(f / "run" / f"{n}.jsonl") for n in ("before", "after")), "--json"),
        note="one answer a prompt",
    ),
    "report": Stage(
        "report",
        lambda f: rankalign("report", str(f / "run")),
        note="six candidates, one answer before and one after, a prompt",
        made="run/report.html",
    ),
    "resume": Stage(
        "open a journal of so many items",
        lambda f: _own("open", str(f)),
        lambda f: [_own("fill", str(f), f.name)],
    ),
}


if __name__ == "__main__":
    word, place, *size = sys.argv[1:]
    if word == "open":
        open_journal(Path(place))
    else:
        {"make": make, "fill": fill_journal}[word](Path(place), int(size[0]))
