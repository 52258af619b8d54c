"""The table: every row with every seed, then the page. What is finished is never run again."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from rankalign.recipes.paper.child import Lock
from rankalign.recipes.paper.claims import Results
from rankalign.recipes.paper.graders import graded
from rankalign.recipes.paper.page import write_page
from rankalign.recipes.paper.seeds import run_apart, run_units
from rankalign.recipes.paper.settings import TableConfig
from rankalign.recipes.paper.unit import Bench, Unit
from rankalign.stages.generation import build_scorer
from rankalign.storage.files import read_text
from rankalign.storage.jsonl import loads


def run(config: TableConfig) -> dict[str, Any]:
    """Run every unit that is missing, and write the page.

    Returns:
        ``{"output", "page", "units", "ran", "seconds", "claims": [{"claim", "verdict"}]}``.

    Raises:
        InputError: bad settings or data, another process is at it, or a row failed; finished units stay.
    """
    folder, started = Path(config.output), time.monotonic()
    with Lock(folder) as lock:
        if config.overwrite:
            for seed in config.seeds:
                shutil.rmtree(folder / f"seed-{seed}", ignore_errors=True)
        units: dict[tuple[str, int], dict[str, Any]] = {}
        bench = Bench(config, lock)
        todo = [Unit(bench, row, seed) for seed in config.seeds for row in config.in_order()]
        for unit in todo:
            unit.check()
        for grader in config.graders:
            build_scorer(grader)  # refuses what it cannot be, before hours of training
        bench.begin()
        ran = run_apart(config, lock) if config.jobs > 1 else run_units(todo)
        for unit in todo:
            figures = loads(read_text(unit.folder / "unit.json"))
            figures["held"] |= graded(unit)
            figures["cost"]["models"] = unit.models()
            units[unit.row.name, unit.seed] = figures
        page = Path(config.page or folder / "results.md")
        claims = write_page(page, config, results(config, units), units)
    told = [{"claim": claim.text, "verdict": str(claim.verdict)} for claim in claims]
    seconds = round(time.monotonic() - started, 1)
    return {"output": config.output, "page": str(page), "units": len(units), "ran": ran} | {
        "seconds": seconds,
        "claims": told,
    }


def results(config: TableConfig, units: dict[tuple[str, int], dict[str, Any]]) -> Results:
    """The figures of all units as arrays of seeds by prompts."""

    def collect(part: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for row in config.rows:
            of_seeds = [units[row.name, seed][part] for seed in config.seeds]
            found[row.name] = {name: np.array([one[name] for one in of_seeds], float) for name in of_seeds[0]}
        return {name: columns for name, columns in found.items() if columns}

    return Results(collect("held"), collect("pool"), collect("cost"))
