"""DPO against TRL's DPOTrainer on the same tokens, reference log-probs given to both, TRL at its best batch size."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.autograd import backward

from benchmarks.data import Lists, bon_lists, hh_pairs, packed
from benchmarks.measure import Row, Steps, smollm_shape
from rankalign.losses import LOSSES
from rankalign.losses.ranked import Ranked
from rankalign.models import load as models
from rankalign.rows.logps import list_logps

BUDGET = 4096  # tokens of a row of ours, the trainer's default
BATCHES = (1, 2, 4, 8)  # pairs a batch that TRL may choose from
TRIAL = 8  # pairs on which it chooses


def strict_pairs(lists: Lists) -> Iterator[tuple[int, int, int]]:
    """(list, winner, loser) of every pair whose scores differ."""
    for p, (_, responses, scores) in enumerate(lists):
        for i in range(len(responses)):
            for j in range(len(responses)):
                if scores[i] > scores[j]:
                    yield p, i, j


def our_step(model: Any, lists: Lists, refs: Tensor) -> Callable[[], float]:
    """DPO's mean over prompts, lists packed into rows of at most BUDGET tokens."""

    def step() -> float:
        total = 0.0
        for rows in packed(lists, BUDGET):
            prompts, responses, scores = zip(*(lists[p] for p in rows), strict=True)
            logps = list_logps(model, prompts, responses, layout="tree")
            width = logps.shape[1]
            ranked = Ranked(
                logps,
                torch.tensor([[len(r) for r in rs] for rs in responses]),
                torch.tensor(scores),
                torch.ones(len(rows), width, dtype=torch.bool),
                refs[rows],
            )
            loss = LOSSES["dpo"].function(ranked, beta=0.1).sum() / len(lists)
            backward(loss)
            total += loss.item()
        return total

    return step


def trl_step(model: Any, lists: Lists, refs: Tensor, batch: int, limit: int | None = None) -> Callable[[], float]:
    """The same loss by TRL's trainer, on unrolled pairs in batches of this size, in random order as it draws them."""
    examples = [
        {
            "prompt_ids": lists[p][0],
            "chosen_ids": lists[p][1][i],
            "rejected_ids": lists[p][1][j],
            "ref_chosen_logps": float(refs[p, i]),
            "ref_rejected_logps": float(refs[p, j]),
        }
        for p, i, j in strict_pairs(lists)
    ]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    trainer = dpo_trainer(model)

    def step() -> float:
        total = 0.0
        for start in range(0, len(order), batch):
            some = [examples[i] for i in order[start : start + batch]]
            loss = trainer.compute_loss(model, trainer.data_collator(some)) * (len(some) / len(order))
            backward(loss)
            total += loss.item()
        return total

    return step


def dpo_trainer(model: Any) -> Any:
    """TRL's trainer around the model, told that reference log-probs come with the data."""
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=0.1, report_to=[], use_cpu=True, activation_checkpointing=False, bf16=False,
        max_length=None, precompute_ref_log_probs=True,
    )  # fmt: skip
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    return DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list([row]), processing_class=models.load_tokenizer("default")
    )


def against_trl(make: Callable[[], Lists]) -> Callable[[Any], Steps]:
    def build(model: Any) -> Steps:
        lists, other = make(), smollm_shape()
        with torch.no_grad():
            refs = torch.stack([list_logps(model, [p], [rs], layout="tree")[0] for p, rs, _ in lists])
        refs = refs + torch.randn(refs.shape, generator=torch.Generator().manual_seed(1))
        ours = our_step(model, lists, refs)
        taken = {}
        for batch in BATCHES:
            step = trl_step(other, lists, refs, batch, TRIAL)
            start = time.perf_counter()
            step()
            taken[batch] = time.perf_counter() - start
        best = min(taken, key=lambda batch: taken[batch])
        theirs = trl_step(other, lists, refs, best)
        pairs, difference = len(list(strict_pairs(lists))), abs(ours() - theirs())
        note = f"{pairs} pairs of {len(lists)} prompts, TRL best at {best} a batch, losses differ by {difference:.0e}"
        return Steps(ours, theirs, note)

    return build


BASELINE = "TRL 1.16 DPOTrainer, reference precomputed"
ROWS = {
    "dpo-pairs": Row("DPO on HH pairs", BASELINE, 1.5, None, against_trl(lambda: hh_pairs(12, 512))),
    "dpo-lists": Row(
        "DPO over all strict pairs of lists of 6",
        BASELINE + ", pairs unrolled",
        4.0,
        None,
        against_trl(lambda: bon_lists(1, 256)),
    ),
}
