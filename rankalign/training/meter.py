"""What a trainer logs: exact means over prompts and pairs, summed on the device and read when they are logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rankalign.data.shares import clustered_wilson
from rankalign.losses.ranked import Ranked
from rankalign.training.dashboards import Dashboards
from rankalign.training.ledger import Ledger, measure


class Meter:
    """Sums over prompts and pairs since the last reading, so that logged means are exact for any logging interval.

    The sums stay on the device; nothing waits for it before :meth:`read`.

    Args:
        ledger: takes each prompt's own figures too.
        rounding: the 16-bit type that the model computes in; pairs that are told apart by less are counted then.
        dashboards: gives sums of more figures, which trackers show.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        rounding: torch.dtype | None = None,
        dashboards: Dashboards | None = None,
    ) -> None:
        self.dashboards = dashboards
        self.rounding = rounding
        self.ledger, self.by_prompt = ledger, list[Tensor]()
        self._prompts = 0
        # By what they are sums of, which may change with a loss's parts. float64: counts and sums exact to the last.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        ranked: Ranked,
        losses: Tensor,
        parts: dict[str, Tensor],
        compared: Tensor | None = None,
        ids: Sequence[str] = (),
    ) -> None:
        """Take in one batch: ``losses`` (P,), the named parts they are made of, (P,) each, the (P, N) values by
        which accuracy and margin go, log-probabilities a token where none are given, and the prompts' ids for the
        ledger."""
        pairs = ranked.pairs
        values = ranked.logps / ranked.lengths.clamp(min=1) if compared is None else compared
        margin = values.unsqueeze(2) - values.unsqueeze(1)
        right = (pairs & (margin > 0)).sum((1, 2))
        # Selecting waits for the device to say how many there are; on a CPU it is quick, and sums in an order of its
        # own, to which published logs are held.
        margins = margin[pairs] if margin.device.type == "cpu" else margin.masked_fill(~pairs, 0)
        sums = {"candidates": ranked.mask.sum(), "tokens": (ranked.lengths * ranked.mask).sum(), "pairs": pairs.sum()}
        sums |= {"right": right.sum(), "margin": margins.sum(), "tied": _tied(ranked), "loss": losses.sum()}
        sums |= {name: part.sum() for name, part in parts.items()}
        measures = measure(ranked, values)
        if compared is None:
            sums["best_logp"] = measures.best.sum()
        if ranked.ref_logps is not None:
            reward = ranked.logps - ranked.ref_logps
            sums["reward_right"] = (pairs & (reward.unsqueeze(2) > reward.unsqueeze(1))).sum()
        if self.rounding is not None:
            narrow = values.to(self.rounding)
            same = (narrow.unsqueeze(2) == narrow.unsqueeze(1)) & (margin != 0)
            sums["within_rounding"] = (pairs & same).sum()
        if self.dashboards is not None and compared is None:
            sums |= self.dashboards(ranked)
        self._prompts += len(losses)
        names, found = tuple(sums), torch.stack([value.detach().double() for value in sums.values()])
        self._sums[names] = self._sums[names] + found if names in self._sums else found
        self.by_prompt.append(torch.stack([right, pairs.sum((1, 2))]))
        if self.ledger is not None:
            self.ledger.add(ids, losses, measures)

    def read(self, prefix: str = "") -> dict[str, float]:
        """Means since the last reading, over all processes, which must all come here: losses over prompts, accuracies
        and margins over strict pairs."""
        own = Counter[str]()
        for names, found in self._sums.items():
            own.update(dict(zip(names, found.tolist(), strict=True)))
        prompts, sums = 0, Counter[str]()
        for some, more in gather_object([(self._prompts, own)]):
            prompts += some
            sums.update(more)
        self._prompts, self._sums = 0, {}
        self.by_prompt.clear()
        pairs = sums.pop("pairs", 0)
        logs: dict[str, float] = {"pairs": pairs, "tied_pairs": sums.pop("tied", 0), "tokens": sums.pop("tokens", 0)}
        logs["candidates"] = sums.pop("candidates", 0)
        if "within_rounding" in sums:
            logs["within_rounding"] = sums.pop("within_rounding")
        for name, label in (("right", "ranking_accuracy"), ("margin", "margin"), ("reward_right", "reward_accuracy")):
            if name in sums and pairs:
                logs[label] = sums[name] / pairs
            sums.pop(name, None)
        logs.update({name: value / max(prompts, 1) for name, value in sums.items()})
        return {prefix + name: value for name, value in logs.items()}

    def accuracy_bounds(self) -> dict[str, float]:
        """95 % interval over prompts, of all processes, of the ranking accuracy since the last reading; empty without
        pairs."""
        own = [torch.cat(self.by_prompt, dim=1).cpu()] if self.by_prompt else []
        by_prompt = gather_object(own)
        bounds = clustered_wilson(*torch.cat(by_prompt, dim=1).tolist()) if by_prompt else None
        return dict(zip(("accuracy_low", "accuracy_high"), bounds or (), strict=False))


def _tied(ranked: Ranked) -> Tensor:
    both = (ranked.mask.unsqueeze(2) & ranked.mask.unsqueeze(1)).triu(diagonal=1)
    return (both & (ranked.scores.unsqueeze(2) == ranked.scores.unsqueeze(1))).sum()
