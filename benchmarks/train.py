"""Training steps on tree rows beside RRHF's arithmetic: time and step memory, taken in turns in one run.

    python -m benchmarks.train                    every row
    python -m benchmarks.train --rows p128k4 two-pass --repeats 3
    python -m benchmarks.train --write            also writes benchmarks/RESULTS.md

The model is a Llama of SmolLM2-135M's shape with random fp32 weights. Times are medians of interleaved repeats of
forward and backward, without the optimiser. Step memory is the highest resident size during a step less that before
it, gradients already allocated, in a process of its own. RRHF's arithmetic pads K rows of P + R tokens, takes the
log_softmax of all logits and lets autograd do the rest; "on our matrix kernel" gives it the products of
rankalign.gemm as well, which leaves the difference that tree rows and the head make.
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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.autograd import backward
from torch.nn.functional import log_softmax, relu

from rankalign import gemm, models
from rankalign.linears import fast_linears
from rankalign.logps import list_logps
from rankalign.tree import tree_tokens
from rankalign.two_pass import backward_two_pass

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("RANKALIGN_DATA", ROOT.parent / "shared" / "data"))
VOCABULARY = 49152

Tokens = list[int]
TokenLists = list[tuple[Tokens, list[Tokens]]]
Step = Callable[[], object]


@dataclass(frozen=True)
class Steps:
    """What a row runs.

    Attributes:
        ours: our step.
        baseline: what it is compared with.
        note: printed behind the figures.
        reach: least ratio of times to reach, where it depends on the data.
    """

    ours: Step
    baseline: Step
    note: str
    reach: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what is measured.
        baseline: what it is measured against.
        reach: least ratio of times to reach, baseline over ours; None where none is set.
        reach_memory: greatest ratio of step memories, ours over the baseline, or None where memory is not compared.
        build: makes the steps for a model.
    """

    title: str
    baseline: str
    reach: float | None
    reach_memory: float | None
    build: Callable[[Any], Steps]


def smollm_shape() -> Any:
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
    ranked = means[order]  # scores rise along it while log-probs fall, so hardly a candidate is free of gradient
    return relu(ranked[:, None] - ranked[None, :]).sum() - sums[order[-1]]


def padded_logps(model: Any, prompt: Tokens, responses: Sequence[Tokens]) -> Tensor:
    """(N,) sums of log-probs as RRHF computes them."""
    rows = [prompt + r for r in responses]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels, counted = ids[:, 1:], mask[:, 1:].clone()
    counted[:, : len(prompt) - 1] = 0
    logps = log_softmax(model(input_ids=ids, attention_mask=mask).logits, dim=-1)[:, :-1]
    return (logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * counted).sum(-1)


def flops(model: Any, tokens: int, head_rows: int, head_products: int) -> int:
    """Operations of the linear layers in a step: forward and two products of backward, and those of the head."""
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    return 2 * (3 * body * tokens + head_products * model.lm_head.weight.numel() * head_rows)


# --- rows --------------------------------------------------------------------------------------------------------


def rank_step(size: tuple[int, int], *, checkpoint: bool = False, same_kernel: bool = False) -> Callable[[Any], Steps]:
    """Forward and backward over one list: prompt tokens and candidates of 96 tokens."""

    def build(model: Any) -> Steps:
        prompt, responses = draw(size[0], 1), [draw(96, 2 + n) for n in range(size[1])]
        lengths = torch.full((size[1],), 96.0)

        def ours() -> None:
            if checkpoint:
                model.gradient_checkpointing_enable()
            backward(rrhf_loss(list_logps(model, [prompt], [responses], layout="tree")[0], lengths))
            model.gradient_checkpointing_disable()

        def baseline() -> None:
            with fast_linears(model, None) if same_kernel else nullcontext():
                logps = padded_logps(model, prompt, responses)
            backward(rrhf_loss(logps, lengths))

        labels, whole = size[1] * 96, size[1] * (size[0] + 96)
        least = flops(model, tree_tokens(size[0], [96] * size[1]), labels, head_products=4) / 1e9
        most = flops(model, whole, whole, head_products=3) / 1e9
        return Steps(ours, baseline, f"{most:.0f} -> {least:.0f} GFLOP in linear layers")

    return build


def ragged(model: Any) -> Steps:
    """Lists of six with lengths of a real best-of-n file, cut to 512 tokens a row."""
    lists = bon_lists(count=8, candidates=6, budget=512)

    def ours() -> None:
        for batch in packed(lists, 4096):
            sums = list_logps(model, [p for p, _ in batch], [r for _, r in batch], layout="tree")
            losses = [rrhf_loss(s, lengths_of(r)) for s, (_, r) in zip(sums, batch, strict=True)]
            backward(torch.stack(losses).sum())

    def baseline() -> None:
        for prompt, responses in lists:
            backward(rrhf_loss(padded_logps(model, prompt, responses), lengths_of(responses)))

    tokens = sum(tree_tokens(len(p), [len(r) for r in rs]) for p, rs in lists)
    padded = sum(len(rs) * (len(p) + max(map(len, rs))) for p, rs in lists)
    return Steps(ours, baseline, f"{len(lists)} prompts a step, {padded} -> {tokens} tokens")


def lengths_of(responses: Sequence[Tokens]) -> Tensor:
    return torch.tensor([float(len(r)) for r in responses])


def bon_lists(count: int, candidates: int, budget: int) -> TokenLists:
    tokenizer = models.load_tokenizer("default")
    lists = []
    with gzip.open(DATA / "bon" / "tulu2_13b_bon.rrhf.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in list(file)[:count]:
            record = json.loads(line)
            prompt = tokenizer(record["query"])["input_ids"][: budget // 2]
            encoded = tokenizer(record["responses"][:candidates])["input_ids"]
            lists.append((prompt, [ids[: budget - len(prompt)] for ids in encoded]))
    return lists


def packed(lists: TokenLists, budget: int) -> list[TokenLists]:
    batches: list[TokenLists] = []
    room = 0
    for prompt, responses in lists:
        need = tree_tokens(len(prompt), [len(r) for r in responses])
        if need > room:
            batches.append([])
            room = budget
        batches[-1].append((prompt, responses))
        room -= need
    return batches


def two_pass(model: Any) -> Steps:
    prompt, responses = draw(128, 1), [draw(96, 2 + n) for n in range(6)]
    lengths, budget = torch.full((6,), 96.0), 128 + 2 * 96

    def ours() -> None:
        backward_two_pass(model, [prompt], [responses], lambda x: rrhf_loss(x[0], lengths), budget, layout="tree")

    def baseline() -> None:
        backward(rrhf_loss(list_logps(model, [prompt], [responses], layout="tree")[0], lengths))

    return Steps(ours, baseline, f"chunks of {budget} tokens")


def active_set(accuracy: float, lists: int, candidates: int) -> Callable[[Any], Steps]:
    """Lists in which a share of the pairs is in order; the baseline gives every candidate some gradient."""

    def build(model: Any) -> Steps:
        prompts = [draw(64, 10 * p) for p in range(lists)]
        responses = [[draw(64, 10 * p + n + 1) for n in range(candidates)] for p in range(lists)]
        touched = violations(lists, candidates, accuracy)
        slopes = torch.tensor([[float(n in some) for n in range(candidates)] for some in touched])
        live = sum(tree_tokens(64, [64] * len(some)) for some in touched if some)
        share = live / (lists * tree_tokens(64, [64] * candidates))
        bound = 3 / (1 + 2 * share)

        def run(slopes: Tensor) -> None:
            backward((list_logps(model, prompts, responses, layout="tree") * slopes).sum())

        note = f"{share:.2f} of the tokens have a gradient, the bound is {bound:.2f}x"
        return Steps(lambda: run(slopes), lambda: run(slopes + 1e-30), note, 0.9 * bound)

    return build


def violations(lists: int, candidates: int, accuracy: float) -> list[set[int]]:
    """Members of violated pairs, where a share of all lists' pairs is in order and the rest is strewn at random."""
    rng, orders = random.Random(0), [list(range(candidates)) for _ in range(lists)]
    wanted = round(lists * candidates * (candidates - 1) / 2 * (1 - accuracy))
    while wanted:
        order, i = rng.choice(orders), rng.randrange(candidates - 1)
        if order[i] < order[i + 1]:  # swapping neighbours that are in order violates exactly one pair more
            order[i], order[i + 1] = order[i + 1], order[i]
            wanted -= 1
    return [{x for i, a in enumerate(order) for b in order[i + 1 :] if a > b for x in (a, b)} for order in orders]


RRHF = "RRHF's arithmetic"
SAME = RRHF + " on our matrix kernel"
SINGLE = "single pass of ours"
K4, K6, LONG = (128, 4), (128, 6), (512, 6)
ROWS = {
    "p128k4": Row("rank-loss step, P=128 K=4 R=96", RRHF, 1.9, 0.65, rank_step(K4)),
    "p128k6": Row("rank-loss step, P=128 K=6 R=96", RRHF, 2.1, 0.45, rank_step(K6)),
    "p512k6": Row("rank-loss step, P=512 K=6 R=96", RRHF, 3.7, 0.30, rank_step(LONG)),
    "p512k6-checkpointing": Row(
        "the same, ours with checkpointing", RRHF, None, 0.16, rank_step(LONG, checkpoint=True)
    ),
    "p128k4-kernel": Row("rank-loss step, P=128 K=4 R=96", SAME, None, None, rank_step(K4, same_kernel=True)),
    "p128k6-kernel": Row("rank-loss step, P=128 K=6 R=96", SAME, None, None, rank_step(K6, same_kernel=True)),
    "p512k6-kernel": Row("rank-loss step, P=512 K=6 R=96", SAME, None, None, rank_step(LONG, same_kernel=True)),
    "ragged": Row("real ragged lists of 6, 512-token budget", RRHF + ", one prompt a batch", 3.0, None, ragged),
    "two-pass": Row("two-pass backward, P=128 K=6 R=96", SINGLE, 1 / 1.4, 0.5, two_pass),
    "active-50": Row("active set, lists of 6, 50 % of pairs in order", SINGLE, None, None, active_set(0.5, 4, 6)),
    "active-70": Row("active set, lists of 6, 70 % of pairs in order", SINGLE, None, None, active_set(0.7, 4, 6)),
    "active-85": Row("active set, lists of 6, 85 % of pairs in order", SINGLE, None, None, active_set(0.85, 4, 6)),
    "active-pairs-85": Row("active set, pairs, 85 % in order", SINGLE, None, None, active_set(0.85, 13, 2)),
}


# --- measuring ---------------------------------------------------------------------------------------------------


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
    backward(list_logps(model, [[1, 2]], [[[3], [4]]]).sum())  # loads libraries, starts threads
    steps = ROWS[name].build(model)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present size
    before = resident("VmRSS")
    (steps.baseline if side else steps.ours)()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


HEADER = """| what | baseline | time | ratio | reach | step memory | ratio | reach | |
|---|---|---|---|---|---|---|---|---|"""


def line_of(name: str, repeats: int, clock: Callable[[], float]) -> str:
    row, model = ROWS[name], smollm_shape()
    steps = row.build(model)
    ours, base = times(model, (steps.ours, steps.baseline), repeats, clock)
    reach = row.reach or steps.reach
    cells = [row.title, row.baseline, f"{base:.2f} s -> {ours:.2f} s", f"**{base / ours:.2f}x**"]
    cells.append("-" if reach is None else f">= {reach:.2f}x")
    if row.reach_memory is None:
        cells += ["-"] * 3
    else:
        used, before = (step_memory(name, side) / 2**20 for side in (0, 1))
        cells += [f"{before:.0f} MiB -> {used:.0f} MiB", f"**{used / before:.2f}x**", f"<= {row.reach_memory:.2f}x"]
    return "| " + " | ".join([*cells, steps.note]) + " |"


def environment() -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    kernel = "oneDNN" if gemm.faster() else "torch's own"
    return f"{versions}; {torch.get_num_threads()} threads, fp32; matrix kernel: {kernel}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
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
