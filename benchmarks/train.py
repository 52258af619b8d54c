"""Training steps on tree rows beside RRHF's arithmetic: time and step memory, taken in turns in one run.

    python -m benchmarks.train                    every row
    python -m benchmarks.train --rows p128k4 two-pass --repeats 3
    python -m benchmarks.train --write            also writes benchmarks/RESULTS.md

The model is a Llama of SmolLM2-135M's shape with random fp32 weights. Times are medians of interleaved repeats of
forward and backward, without the optimiser. Step memory is the highest resident size during a step less that before
it, gradients already allocated, in a process of its own. RRHF's arithmetic pads K rows of P + R tokens, takes the
log_softmax of all logits and lets autograd do the rest.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import log_softmax, relu
from torch.utils.flop_counter import FlopCounterMode

from rankalign import models
from rankalign.logps import list_logps
from rankalign.tree import tree_tokens
from rankalign.two_pass import backward_two_pass

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("RANKALIGN_DATA", ROOT.parent / "shared" / "data"))
VOCABULARY = 49152

Tokens = list[int]
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what is measured.
        baseline: what it is measured against.
        reach: least ratio of times, baseline over ours.
        reach_memory: greatest ratio of step memories, ours over the baseline, or None where memory is not compared.
        build: makes the two steps, ours and the baseline's, and the note to print behind them.
    """

    title: str
    baseline: str
    reach: float
    reach_memory: float | None
    build: Callable[[torch.nn.Module], tuple[Step, Step, str]]


def smollm_shape() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).train()


def draw(length: int, seed: int) -> Tokens:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- losses and RRHF's arithmetic --------------------------------------------------------------------------------


def rrhf_loss(sums: Tensor, lengths: Tensor) -> Tensor:
    """Hinge over all pairs of (N,) length-normalised log-probs, scored so that every pair is violated, and SFT."""
    means = sums / lengths
    order = means.detach().argsort(descending=True)
    ranked = means[order]  # scores rise along it while log-probs fall, so no candidate is free of gradient
    return relu(ranked[:, None] - ranked[None, :]).sum() - sums[order[-1]]


def padded_logps(model: torch.nn.Module, prompt: Tokens, responses: Sequence[Tokens]) -> Tensor:
    """(N,) sums of log-probs as RRHF computes them."""
    rows = [prompt + r for r in responses]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels, counted = ids[:, 1:], mask[:, 1:].clone()
    counted[:, : len(prompt) - 1] = 0
    logps = log_softmax(model(input_ids=ids, attention_mask=mask).logits, dim=-1)[:, :-1]
    return (logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * counted).sum(-1)


# --- rows --------------------------------------------------------------------------------------------------------


def rank_step(
    prompt_length: int, candidates: int, checkpointing: bool = False
) -> Callable[..., tuple[Step, Step, str]]:
    def build(model: torch.nn.Module) -> tuple[Step, Step, str]:
        prompt, responses = draw(prompt_length, 1), [draw(96, 2 + n) for n in range(candidates)]
        lengths = torch.full((candidates,), 96.0)

        def ours() -> None:
            if checkpointing:
                model.gradient_checkpointing_enable()
            rrhf_loss(list_logps(model, [prompt], [responses], layout="tree")[0], lengths).backward()
            if checkpointing:
                model.gradient_checkpointing_disable()

        def baseline() -> None:
            rrhf_loss(padded_logps(model, prompt, responses), lengths).backward()

        flops = [count_flops(model, step) for step in (ours, baseline)]
        return ours, baseline, f"matrix products {flops[0] / 1e9:.0f} and {flops[1] / 1e9:.0f} GFLOP"

    return build


def ragged(model: torch.nn.Module) -> tuple[Step, Step, str]:
    """Lists of six with lengths of a real best-of-n file, cut to 512 tokens a row."""
    lists = bon_lists(count=8, candidates=6, budget=512)

    def ours() -> None:
        for batch in packed(lists, 4096):
            sums = list_logps(model, [p for p, _ in batch], [r for _, r in batch], layout="tree")
            losses = [rrhf_loss(s, lengths_of(r)) for s, (_, r) in zip(sums, batch, strict=True)]
            torch.stack(losses).sum().backward()

    def baseline() -> None:
        for prompt, responses in lists:
            rrhf_loss(padded_logps(model, prompt, responses), lengths_of(responses)).backward()

    ours_tokens = sum(tree_tokens(len(p), [len(r) for r in rs]) for p, rs in lists)
    padded = sum(len(rs) * (len(p) + max(map(len, rs))) for p, rs in lists)
    return ours, baseline, f"{len(lists)} prompts a step, {ours_tokens} and {padded} tokens"


def lengths_of(responses: Sequence[Tokens]) -> Tensor:
    return torch.tensor([float(len(r)) for r in responses])


def bon_lists(count: int, candidates: int, budget: int) -> list[tuple[Tokens, list[Tokens]]]:
    tokenizer = models.load_tokenizer("default")
    lists = []
    with gzip.open(DATA / "bon" / "tulu2_13b_bon.rrhf.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in list(file)[:count]:
            record = json.loads(line)
            prompt = tokenizer(record["query"])["input_ids"][: budget // 2]
            encoded = tokenizer(record["responses"][:candidates])["input_ids"]
            lists.append((prompt, [ids[: budget - len(prompt)] for ids in encoded]))
    return lists


def packed(lists: Sequence[tuple[Tokens, list[Tokens]]], budget: int) -> list[list[tuple[Tokens, list[Tokens]]]]:
    batches: list[list[tuple[Tokens, list[Tokens]]]] = []
    room = 0
    for prompt, responses in lists:
        need = tree_tokens(len(prompt), [len(r) for r in responses])
        if need > room:
            batches.append([])
            room = budget
        batches[-1].append((prompt, responses))
        room -= need
    return batches


def two_pass(model: torch.nn.Module) -> tuple[Step, Step, str]:
    prompt, responses = draw(128, 1), [draw(96, 2 + n) for n in range(6)]
    lengths, budget = torch.full((6,), 96.0), 128 + 96

    def ours() -> None:
        backward_two_pass(model, [prompt], [responses], lambda x: rrhf_loss(x[0], lengths), budget, layout="tree")

    def baseline() -> None:
        rrhf_loss(list_logps(model, [prompt], [responses], layout="tree")[0], lengths).backward()

    return ours, baseline, f"chunks of {budget} tokens"


def active_set(accuracy: float) -> Callable[[torch.nn.Module], tuple[Step, Step, str]]:
    """Four lists of six in which a share of the pairs is in order; the baseline gives every candidate some gradient."""

    def build(model: torch.nn.Module) -> tuple[Step, Step, str]:
        prompts = [draw(64, 10 * p) for p in range(4)]
        responses = [[draw(64, 10 * p + n + 1) for n in range(6)] for p in range(4)]
        rng = random.Random(0)
        touched = [violated(6, round(15 * (1 - accuracy)), rng) for _ in prompts]
        slopes = torch.tensor([[float(n in some) for n in range(6)] for some in touched])
        live = sum(tree_tokens(64, [64] * len(some)) for some in touched if some)
        share = live / sum(tree_tokens(64, [64] * 6) for _ in prompts)

        def run(slopes: Tensor) -> None:
            (list_logps(model, prompts, responses, layout="tree") * slopes).sum().backward()

        note = f"{share:.2f} of the tokens have a gradient, the bound is {3 / (1 + 2 * share):.2f}"
        return lambda: run(slopes), lambda: run(slopes + 1e-30), note

    return build


def violated(n: int, inversions: int, rng: random.Random) -> set[int]:
    """Members of violated pairs in a random order of ``n`` that has this many inversions."""
    order, seen = list(range(n)), 0
    while seen < inversions:
        i = rng.randrange(n - 1)
        if order[i] < order[i + 1]:
            order[i], order[i + 1] = order[i + 1], order[i]
            seen += 1
    return {x for i, a in enumerate(order) for b in order[i + 1 :] if a > b for x in (a, b)}


RRHF = "RRHF's arithmetic"
SINGLE = "single pass of ours"
ROWS = {
    "p128k4": Row("rank-loss step, P=128 K=4 R=96", RRHF, 1.9, 0.65, rank_step(128, 4)),
    "p128k6": Row("rank-loss step, P=128 K=6 R=96", RRHF, 2.1, 0.45, rank_step(128, 6)),
    "p512k6": Row("rank-loss step, P=512 K=6 R=96", RRHF, 3.7, 0.30, rank_step(512, 6)),
    "p512k6-checkpointing": Row("the same, ours with checkpointing", RRHF, 1.0, 0.16, rank_step(512, 6, True)),
    "ragged": Row("real ragged lists of 6, 512-token budget", RRHF + ", one prompt a batch", 3.0, None, ragged),
    "two-pass": Row("two-pass backward, P=128 K=6 R=96", SINGLE, 1 / 1.4, 0.5, two_pass),
    "active-50": Row("active set, lists of 6, 50 % of pairs in order", SINGLE, 1.0, None, active_set(0.50)),
    "active-70": Row("active set, lists of 6, 70 % of pairs in order", SINGLE, 1.0, None, active_set(0.70)),
    "active-85": Row("active set, lists of 6, 85 % of pairs in order", SINGLE, 1.0, None, active_set(0.85)),
}


# --- measuring ---------------------------------------------------------------------------------------------------


def count_flops(model: torch.nn.Module, step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    model.zero_grad()
    return int(counter.get_total_flops())


def times(model: torch.nn.Module, steps: Sequence[Step], repeats: int, clock: Callable[[], float]) -> list[float]:
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


def step_memory(name: str, side: int) -> int:
    """Bytes that a step adds to the resident size at its highest, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train", "--memory-of", name, str(side)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return int(printed.splitlines()[-1])


def measure_memory(name: str, side: int) -> int:
    """The work of the process that :func:`step_memory` starts."""
    model = smollm_shape()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    list_logps(model, [[1, 2]], [[[3], [4]]]).sum().backward()  # loads libraries, starts threads
    count = globals()["count_flops"]
    globals()["count_flops"] = lambda *_: 0  # it would run the steps beforehand
    steps = ROWS[name].build(model)[:2]
    globals()["count_flops"] = count
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present size
    before = resident("VmRSS")
    steps[side]()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def line_of(name: str, repeats: int, clock: Callable[[], float]) -> str:
    row = ROWS[name]
    model = smollm_shape()
    ours, baseline, note = row.build(model)
    seconds = times(model, (ours, baseline), repeats, clock)
    time_cell = f"{seconds[1]:.2f} s -> {seconds[0]:.2f} s | **{seconds[1] / seconds[0]:.2f}x** | >= {row.reach:.2f}x"
    memory_cell = "- | - | -"
    if row.reach_memory is not None:
        used, base = (step_memory(name, side) for side in (0, 1))
        ratio = used / base
        memory_cell = (
            f"{base / 2**20:.0f} MiB -> {used / 2**20:.0f} MiB | **{ratio:.2f}x** | <= {row.reach_memory:.2f}x"
        )
    return f"| {row.title} | {row.baseline} | {time_cell} | {memory_cell} | {note} |"


HEADER = """| what | baseline | time | ratio | reach | step memory | ratio | reach | |
|---|---|---|---|---|---|---|---|---|"""


def environment() -> str:
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{versions}; {threads} threads, fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if arguments.memory_of:
        print(measure_memory(arguments.memory_of[0], int(arguments.memory_of[1])))
        return
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    lines = [f"{environment()}; medians of {arguments.repeats} ({arguments.clock} clock)", "", *HEADER.splitlines()]
    print("\n".join(lines), flush=True)
    for name in arguments.rows:
        lines.append(line_of(name, arguments.repeats, clock))
        print(lines[-1], flush=True)
    if arguments.write:
        Path(__file__).with_name("RESULTS.md").write_text("# Benchmarks\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
