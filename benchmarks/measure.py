"""What the benchmarks share: rows of two steps that take turns, step memory, and the table they end in."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import backward

from benchmarks.results import ROOT as ROOT
from benchmarks.results import cpu_name
from benchmarks.results import write_section as write_section
from rankalign.rows import gemm
from rankalign.rows.logps import list_logps

VOCABULARY = 49152

Tokens = list[int]
Step = Callable[[], object]


@dataclass(frozen=True)
class Steps:
    """What a row runs.

    Attributes:
        ours: our step.
        baseline: what it is compared with.
        note: printed behind the figures.
        reach: least ratio of times to reach, where it depends on the data.
        model: whose gradients are cleared between steps; the shared one where None.
    """

    ours: Step
    baseline: Step
    note: str
    reach: float | None = None
    model: Any = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what is measured.
        baseline: what it is measured against.
        reach: least ratio of times to reach, baseline over ours; None where none is set.
        reach_memory: greatest ratio of step memories, ours over the baseline, or None where memory is not compared.
        build: makes the steps for a model.
        timed: whether times are compared.
    """

    title: str
    baseline: str
    reach: float | None
    reach_memory: float | None
    build: Callable[[Any], Steps]
    timed: bool = True


def smollm_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )


def smollm_shape() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(smollm_config()).train()


def draw(length: int, seed: int) -> Tokens:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def times(model: Any, steps: Sequence[Step], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each step, the steps taking turns."""
    taken: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(repeats):
        for step, seconds in zip(steps, taken, strict=True):
            model.zero_grad(set_to_none=False)
            start = clock()
            step()
            seconds.append(clock() - start)
    return [statistics.median(seconds) for seconds in taken]


def step_memory(module: str, name: str, side: int) -> int:
    """Bytes that a step adds to the resident size at its highest, in a fresh process."""
    command = [sys.executable, "-m", module, "--memory-of", name, str(side)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return int(printed.splitlines()[-1])


def measure_memory(row: Row, side: int) -> int:
    """The work of the process that :func:`step_memory` starts."""
    model = smollm_shape()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    backward(list_logps(model, [[1, 2]], [[[3], [4]]]).sum())  # loads libraries, starts threads
    steps = row.build(model)
    ctypes.CDLL(None).malloc_trim(0)  # what has been freed so far is none of the step's
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present size
    before = resident("VmRSS")
    (steps.baseline if side else steps.ours)()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


HEADER = """| what | baseline | time | ratio | reach | step memory | ratio | reach | |
|---|---|---|---|---|---|---|---|---|"""


def line_of(module: str, name: str, row: Row, repeats: int, clock: Callable[[], float]) -> str:
    model = smollm_shape()
    steps = row.build(model)
    cells = [row.title, row.baseline]
    if row.timed:
        ours, base = times(steps.model or model, (steps.ours, steps.baseline), repeats, clock)
        reach = row.reach or steps.reach
        cells += [f"{base:.2f} s -> {ours:.2f} s", f"**{base / ours:.2f}x**", f">= {reach:.2f}x" if reach else "-"]
    else:
        cells += ["-"] * 3
    if row.reach_memory is None:
        cells += ["-"] * 3
    else:
        used, before = (step_memory(module, name, side) / 2**20 for side in (0, 1))
        cells += [f"{before:.0f} MiB -> {used:.0f} MiB", f"**{used / before:.2f}x**", f"<= {row.reach_memory:.2f}x"]
    return "| " + " | ".join([*cells, steps.note]) + " |"


def environment() -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    kernel = "oneDNN" if gemm.faster() else "torch's own"
    return f"{versions}; {processor()}, {torch.get_num_threads()} threads, fp32; our matrix kernel: {kernel}"


def processor() -> str:
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def main(module: str, rows: Mapping[str, Row], description: str | None) -> None:
    """The command line of a benchmark: measure rows, print them, and write them if so asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(rows), default=list(rows), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(measure_memory(rows[arguments.memory_of[0]], int(arguments.memory_of[1])))
        return
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    today = datetime.date.today().isoformat()
    lines = [f"{today}; {environment()}; medians of {arguments.repeats} ({arguments.clock} clock)", ""]
    lines += HEADER.splitlines()
    print("\n".join(lines), flush=True)
    for name in arguments.rows:
        lines.append(line_of(module, name, rows[name], arguments.repeats, clock))
        print(lines[-1], flush=True)
        if arguments.write:  # after each row: a run of half an hour may be stopped
            write_section(f"`python -m {module}`", lines)
