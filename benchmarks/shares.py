"""What a training step spends its time on, by kind of operation, on this processor: ours beside RRHF's arithmetic.

    python -m benchmarks.shares                   one thread
    python -m benchmarks.shares --threads 2 --write

The step is the one of `benchmarks.train`, P=128 K=6 R=96. torch's profiler gives each operation its own time, without
what it calls; the profiled step stands for the kinds' shares alone, and its seconds are of steps without a profiler.
Two figures of the processor stand beside them: a product of two square matrices of 2,048, and a product of two
activations that is written to a third, which is what memory gives to everything that is no matrix product.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Step, environment, smollm_shape, write_section
from benchmarks.train import K6, flops, rank_step
from rankalign.rows import gemm
from rankalign.rows.tree import tree_tokens

KINDS = ("products", "attention", "exp and log", "activations", "around them")
ATTENTION = "scaled_dot_product"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "_linear_pointwise")
TRANSCENDENT = ("aten::exp", "aten::log", "aten::_log_softmax", "aten::logaddexp")


def kind_of(operation: str) -> str:
    """The kind of an operation of the profiler's table; what is not torch's own is Python and autograd around it."""
    if ATTENTION in operation:
        return "attention"
    if any(operation == name or operation.endswith(name) for name in PRODUCTS):
        return "products"
    if operation.startswith(TRANSCENDENT):
        return "exp and log"
    return "activations" if operation.startswith("aten::") else "around them"


def shares(step: Step) -> dict[str, float]:
    """Share of each kind in the processor time of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    total: Counter[str] = Counter()
    for event in profiled.key_averages():
        total[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: total[kind] / sum(total.values()) for kind in KINDS}


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Median processor time a thread; the first run does not count."""
    step()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        taken.append((time.process_time() - start) / torch.get_num_threads())
    return statistics.median(taken)


def processor_rates(repeats: int) -> str:
    """What the processor gives to a product of matrices and to one of activations, in a sentence."""
    square, activation = torch.randn(2048, 2048), torch.randn(698, 1536)
    product = 2 * 2048**3 / seconds(lambda: gemm.product(square, square), repeats) / 1e9
    moved = 3 * activation.nbytes / seconds(lambda: activation * activation, 20 * repeats) / 1e9
    return f"A square product of 2,048 runs at {product:.0f} GFLOP/s, a product of two activations at {moved:.0f} GB/s."


def main() -> None:
    """Print the table, and write it if so asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = smollm_shape()
    steps = rank_step(K6)(model)
    labels = K6[1] * 96
    work = flops(model, tree_tokens(K6[0], [96] * K6[1]), labels, head_products=4) / 1e9
    clock = f"medians of {arguments.repeats}, processor time a thread"
    lines = [f"{datetime.date.today().isoformat()}; {environment()}; {clock}", ""]
    lines += ["| step | time | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
    for title, step in (("ours", steps.ours), ("RRHF's arithmetic", steps.baseline)):
        taken, found = seconds(step, arguments.repeats), shares(step)
        cells = [f"{100 * found[kind]:.1f} % ({taken * found[kind]:.2f} s)" for kind in KINDS]
        lines.append(f"| {title} | {taken:.2f} s | " + " | ".join(cells) + " |")
    lines += ["", f"Ours: {work:.0f} GFLOP in linear layers. {processor_rates(arguments.repeats)}"]
    print("\n".join(lines))
    if arguments.write:
        write_section("`python -m benchmarks.shares`", lines)


if __name__ == "__main__":
    main()
