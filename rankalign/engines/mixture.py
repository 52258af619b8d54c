"""Texts drawn from two models at once: the geometric mixture that Nash-MD plays against.

A token's probability is proportional to ``policy^(1 - share) * start^share`` (Munos et al. 2023, arXiv:2312.00886,
its one-step-at-once mixture of the two policies), after which temperature and filters act as they do on any logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankalign.engines.decode import Rows
from rankalign.engines.uncached import rows_of

Start = Callable[[Any], AbstractContextManager[Any]]
"""Gives the start model of a model, for as long as the context lasts: it may be the same one without its adapter."""


class MixedRows(Rows):
    """As :class:`rankalign.engines.decode.Rows`, by two models of one vocabulary.

    Args:
        model: the policy.
        start: the other one.
        share: its exponent, from 0 to 1.
        prompts: as for :func:`rankalign.engines.uncached.rows_of`.
        limit: as for that.
        decoding: as for that.
        search: as for that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: Start,
        share: float,
        prompts: Sequence[Sequence[int]],
        limit: int,
        decoding: str = "auto",
        search: bool = False,
    ) -> None:
        self._policy, self._start, self._share = model, start, share
        self._own = rows_of(model, prompts, limit, decoding, search)
        with start(model) as other:
            self._other = rows_of(other, prompts, limit, decoding, search)
        self.logits = self._mixed()

    @torch.inference_mode()
    def _mixed(self) -> Tensor:
        own, other = (rows.logits.log_softmax(-1) for rows in (self._own, self._other))
        return own.mul(1 - self._share).add_(other.to(own), alpha=self._share)

    def told(self, numbers: Tensor) -> list[Any]:
        """As of the policy's rows, whose logits a damaged start model would spoil as well."""
        return self._own.told(numbers)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or reorder rows."""
        self._own.select(rows)
        self._other.select(rows)
        self.logits = self._mixed()

    def append(self, tokens: Tensor) -> None:
        """Put one token behind each row and compute the next logits; ``tokens`` is (R,)."""
        self._own.append(tokens)
        with self._start(self._policy):
            self._other.append(tokens)
        self.logits = self._mixed()
