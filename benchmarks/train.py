"""Training steps on tree rows beside RRHF's arithmetic: time and step memory, taken in turns in one run.

    python -m benchmarks.train                    every row
    python -m benchmarks.train --rows p128k4 two-pass --repeats 3
    python -m benchmarks.train --write            also writes benchmarks/RESULTS.md

The model is a Llama of SmolLM2-135M's shape with random fp32 weights. Times are medians of interleaved repeats of
forward and backward, without the optimiser. Step memory is the highest resident size during a step less that before
it, gradients already allocated, in a process of its own. RRHF's arithmetic pads K rows of P + R tokens, takes the
log_softmax of all logits and lets autograd do the rest; "on our matrix kernel" gives it the products of
rankalign.rows.gemm as well, which leaves the difference that tree rows and the head make.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import backward
from torch.nn.functional import log_softmax, relu

from benchmarks import scoring, trl
from benchmarks.data import bon_lists, packed
from benchmarks.measure import Row, Steps, Tokens, draw, main
from rankalign.rows.linears import fast_linears
from rankalign.rows.logps import list_logps
from rankalign.rows.tree import tree_tokens
from rankalign.rows.two_pass import backward_two_pass

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
    found = bon_lists(4, 512)
    lists, rows = [(p, rs) for p, rs, _ in found], packed(found, 4096)

    def ours() -> None:
        for row in rows:
            batch = [lists[i] for i in row]
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


BUDGET = 128 + 2 * 96


def two_pass_step(model: Any, candidates: int) -> Callable[[], object]:
    prompt, responses = draw(128, 1), [draw(96, 2 + n) for n in range(candidates)]
    lengths = torch.full((candidates,), 96.0)
    return lambda: backward_two_pass(
        model, [prompt], [responses], lambda x: rrhf_loss(x[0], lengths), BUDGET, layout="tree"
    )


def two_pass(model: Any) -> Steps:
    prompt, responses = draw(128, 1), [draw(96, 2 + n) for n in range(6)]
    lengths = torch.full((6,), 96.0)

    def baseline() -> None:
        backward(rrhf_loss(list_logps(model, [prompt], [responses], layout="tree")[0], lengths))

    return Steps(two_pass_step(model, 6), baseline, f"chunks of {BUDGET} tokens")


def flat(model: Any) -> Steps:
    return Steps(two_pass_step(model, 16), two_pass_step(model, 4), f"chunks of {BUDGET} tokens")


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
        "the same, ours with checkpointing", RRHF, None, 0.16, rank_step(LONG, checkpoint=True), timed=False
    ),
    "p128k6-kernel": Row("rank-loss step, P=128 K=6 R=96", SAME, None, None, rank_step(K6, same_kernel=True)),
    "p512k6-kernel": Row("rank-loss step, P=512 K=6 R=96", SAME, None, None, rank_step(LONG, same_kernel=True)),
    "ragged": Row("real ragged lists of 6, 512-token budget", RRHF + ", one prompt a batch", 3.0, None, ragged),
    "two-pass": Row("two-pass backward, P=128 K=6 R=96", SINGLE, 1 / 1.4, 0.5, two_pass),
    "two-pass-16": Row("two-pass backward, P=128 K=16 R=96", "the same with K=4", None, 1.15, flat, timed=False),
    "active-50": Row("active set, lists of 6, 50 % of pairs in order", SINGLE, None, None, active_set(0.5, 4, 6)),
    "active-70": Row("active set, lists of 6, 70 % of pairs in order", SINGLE, None, None, active_set(0.7, 4, 6)),
    "active-85": Row("active set, lists of 6, 85 % of pairs in order", SINGLE, None, None, active_set(0.85, 4, 6)),
    "active-pairs-85": Row("active set, pairs, 85 % in order", SINGLE, None, None, active_set(0.85, 13, 2)),
    **trl.ROWS,
    **scoring.ROWS,
}


if __name__ == "__main__":
    main("benchmarks.train", ROWS, __doc__)
