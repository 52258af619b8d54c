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
from rankalign.rows.upload import to_device

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


def references(model: Any, lists: Lists) -> Tensor:
    """(P, N) sums under the model itself and a little noise, on the host: at exact equality a loss tells nothing."""
    with torch.no_grad():
        refs = torch.stack([list_logps(model, [p], [rs], layout="tree")[0].cpu() for p, rs, _ in lists])
    return refs + torch.randn(refs.shape, generator=torch.Generator().manual_seed(1))


def our_step(
    model: Any, lists: Lists, refs: Tensor, *, loss: str = "dpo", layout: str = "tree", **keywords: Any
) -> Callable[[], float]:
    """A loss's mean over prompts (DPO's by default), lists packed into rows of at most BUDGET tokens."""

    def step() -> float:
        total = torch.zeros((), device=model.device)
        for rows in packed(lists, BUDGET):
            prompts, responses, scores = zip(*(lists[p] for p in rows), strict=True)
            logps = list_logps(model, prompts, responses, layout=layout)
            rest = to_device(
                logps.device,
                torch.tensor([[len(r) for r in rs] for rs in responses]),
                torch.tensor(scores),
                torch.ones(logps.shape, dtype=torch.bool),
                refs[rows],
            )
            value = LOSSES[loss].function(Ranked(logps, *rest), **keywords).sum() / len(lists)
            backward(value)
            total += value.detach()  # read at the end: a GPU would be waited for at every row
        return float(total)

    return step


def trl_step(
    model: Any, lists: Lists, refs: Tensor, batch: int, limit: int | None = None, trainer: Any = None
) -> Callable[[], float]:
    """DPO by TRL's trainer, on unrolled pairs in batches of this size, in random order as it draws them."""
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
    trainer = trainer or dpo_trainer(model)

    def step() -> float:
        total = torch.zeros((), device=model.device)
        for start in range(0, len(order), batch):
            some = [examples[i] for i in order[start : start + batch]]
            batched = trainer._prepare_inputs(trainer.data_collator(some))
            loss = trainer.compute_loss(model, batched) * (len(some) / len(order))
            backward(loss)
            total += loss.detach()
        return float(total)

    return step


def best_batch(
    make: Callable[[int], Callable[[], float]], clock: Callable[[], float] = time.perf_counter, warm: bool = False
) -> int:
    """The batch size, of BATCHES, at which a trial step takes least; one that a GPU has no memory for is none.

    Args:
        make: the step of a batch size.
        clock: tells seconds.
        warm: run each once before, as where kernels are compiled at first.
    """
    taken = {}
    for batch in BATCHES:
        step = make(batch)
        try:
            if warm:
                step()
            start = clock()
            step()
        except torch.OutOfMemoryError:
            break
        taken[batch] = clock() - start
    return min(taken, key=lambda batch: taken[batch], default=BATCHES[0])


def dpo_trainer(model: Any, tokenizer: str = "default", **more: Any) -> Any:
    """TRL's trainer around the model, told that reference log-probs come with the data."""
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    told: dict[str, Any] = {"use_cpu": True, "activation_checkpointing": False, "bf16": False, "max_length": None}
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=0.1, report_to=[], precompute_ref_log_probs=True, **told | more
    )
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    return DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list([row]), processing_class=models.load_tokenizer(tokenizer)
    )


def against_trl(make: Callable[[], Lists]) -> Callable[[Any], Steps]:
    def build(model: Any) -> Steps:
        lists, other = make(), smollm_shape()
        refs = references(model, lists)
        ours = our_step(model, lists, refs, beta=0.1)
        best = best_batch(lambda batch: trl_step(other, lists, refs, batch, TRIAL))
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
