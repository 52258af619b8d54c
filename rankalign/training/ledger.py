"""What training knew of each example, epoch by epoch: ``ledger.jsonl``, at the cost of a few sums a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from rankalign.losses.ranked import Ranked
from rankalign.storage import jsonl

NAME = "ledger.jsonl"
WHOLE = 1024  # batches whose figures may lie on the device, half a kilobyte each, before they are fetched
Entry = dict[str, Any]


class Measures(NamedTuple):
    """What is noted of P prompts, each (P,): see :func:`measure`."""

    best: Tensor
    worst: Tensor
    tau: Tensor


@torch.no_grad()
def measure(ranked: Ranked, values: Tensor) -> Measures:
    """How the model orders each list.

    Args:
        ranked: P lists.
        values: (P, N) what the model makes of the candidates: mean log-probabilities a token, or rewards.

    Returns:
        The value of the candidate with the highest score and of that with the lowest, means where several share it;
        and Kendall's tau-b (1945) of values against scores, ``sum sign(dv) sign(ds) / sqrt(#(dv != 0) #(ds != 0))``
        over pairs, NaN where one of them is all ties.
    """
    scores, values, mask = ranked.scores.double(), values.double(), ranked.mask
    top = scores.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
    bottom = scores.masked_fill(~mask, math.inf).amin(1, keepdim=True)
    best, worst = (
        (values.masked_fill(~of, 0).sum(1) / of.sum(1)) for of in (mask & (scores == end) for end in (top, bottom))
    )
    pairs = (mask.unsqueeze(2) & mask.unsqueeze(1)).triu(diagonal=1)
    by_value, by_score = (((x.unsqueeze(2) - x.unsqueeze(1)).sign() * pairs) for x in (values, scores))
    untied = by_value.abs().sum((1, 2)) * by_score.abs().sum((1, 2))
    return Measures(best, worst, (by_value * by_score).sum((1, 2)) / untied.sqrt())


class Ledger:
    """One entry an example and epoch: ``id, epoch, step, loss, best, worst, margin, tau``.

    ``epoch`` and ``step`` count from 1, ``margin`` is ``best - worst``; what is not defined is null.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], Entry] = {}
        self._new: list[tuple[Sequence[str], int, int, Tensor]] = []  # on the device, which nobody waits for yet
        self.epoch, self.step = 1, 1

    @property
    def entries(self) -> dict[tuple[str, int], Entry]:
        """All entries by id and epoch; waits for the device where some are new."""
        new, self._new = self._new, []
        rows = iter(torch.cat([some for *_, some in new]).tolist() if new else [])
        for ids, epoch, step, _ in new:
            for ident in ids:
                loss, best, worst, tau = (value if math.isfinite(value) else None for value in next(rows))
                margin = None if best is None or worst is None else best - worst
                entry = {"id": ident, "epoch": epoch, "step": step, "loss": loss}
                self._entries[ident, epoch] = entry | {"best": best, "worst": worst, "margin": margin, "tau": tau}
        return self._entries

    def add(self, ids: Sequence[str], losses: Tensor, measures: Measures) -> None:
        """Take in one batch; an example that comes again within an epoch replaces its entry."""
        rows = torch.stack([losses.detach().double(), *measures]).T
        if len(rows) != len(ids):
            raise ValueError(f"{len(ids)} ids for {len(rows)} lists")
        self._new.append((ids, self.epoch, self.step, rows))
        if len(self._new) == WHOLE:
            self.entries  # noqa: B018

    def read(self, path: Path, steps: int) -> None:
        """Go on with the file of an earlier run; entries of steps behind its checkpoint are about to be made again."""
        if path.exists() and path.stat().st_size:
            old = [row for _, row in jsonl.read_rows(path) if row["step"] <= steps]
            self._entries, self._new = {(row["id"], row["epoch"]): row for row in old}, []

    def write(self, path: Path, first: bool) -> None:
        """Write the entries of all ranks, whole and atomically; ``first`` tells the rank that writes."""
        rows = gather_object(list(self.entries.values()))
        if first:
            jsonl.write_rows(path, sorted(rows, key=lambda row: row["step"]))


class LedgerFile(TrainerCallback):
    """Keeps the ledger's clock and its file; the trainer also writes it just before each checkpoint."""

    def __init__(self, ledger: Ledger, path: Path) -> None:
        self.ledger, self.path = ledger, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read what an interrupted run left, on the rank that holds it for all."""
        if state.is_world_process_zero:
            self.ledger.read(self.path, state.global_step)
        self._set(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What comes now belongs to the next update."""
        self._set(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the whole ledger behind."""
        self.save(state)

    def save(self, state: Any) -> None:
        """Write the file; all ranks must come here."""
        self.ledger.write(self.path, state.is_world_process_zero)

    def _set(self, state: Any) -> None:
        self.ledger.epoch, self.ledger.step = int(state.epoch or 0) + 1, state.global_step + 1
