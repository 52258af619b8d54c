"""The reference's log-probabilities, computed when an update is about to need them, and for updates that run alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from rankalign.data.encode import TokenList
from rankalign.models import load as models
from rankalign.training.reference import ReferenceCache
from rankalign.training.settings import ModelSettings

Compute = Callable[[Any, Sequence[TokenList]], list[Tensor]]
"""(N,) log-probabilities of each list under a model."""


class Beside(Protocol):
    """A reference model at hand."""

    def beside(self, model: Any, untouched: bool = False) -> AbstractContextManager[Any]:
        """The reference of ``model``, for as long as the context lasts; see :class:`StartModel`."""
        ...

    def forget(self) -> None:
        """Give back the memory of what can be had again."""
        ...


class StartModel:
    """The model as it was before training.

    Until the first update it is the one that trains. After that it is what a fresh adapter lies on; else a second copy
    of the weights, loaded when it is first asked for.

    Args:
        settings: name the start model.
        dtype: of the weights that train.
    """

    def __init__(self, settings: ModelSettings, dtype: str) -> None:
        self.settings, self.dtype = settings, dtype
        # An adapter that trains on did not begin at zero: below it is another model than the one that it began as.
        self.below_adapter = settings.use_lora and not models.is_adapter(settings.model)
        self._copy: Any = None

    @contextmanager
    def beside(self, model: Any, untouched: bool = False) -> Iterator[Any]:
        """The start model, in eval mode, for as long as the context lasts; ``model`` is what trains."""
        training = model.training
        try:
            if untouched:
                yield model
            elif self.below_adapter:
                with model.disable_adapter():
                    yield model
            else:
                yield self.copy()
        finally:
            model.train(training)

    def copy(self) -> Any:
        """The second copy."""
        if self._copy is None:
            of = self.settings
            more: dict[str, Any] = {"bits": of.quantised, "train_adapter": of.use_lora}
            self._copy = models.load_policy(of.model, dtype=self.dtype, **more).requires_grad_(False)
            size = sum(p.numel() * p.element_size() for p in self._copy.parameters()) >> 20
            print(f"reference: a second copy of the start model is loaded, {size} MiB", file=sys.stderr, flush=True)
        return self._copy

    def forget(self) -> None:
        """Give the second copy's memory back; it is loaded again if need be."""
        self._copy = None


class References:
    """What the reference gives to lists, from the cache where it is known.

    Args:
        cache: where they are kept; None where the reference moves, and nothing that is known holds for long.
        start: computes the others.
        compute: how.
    """

    def __init__(self, cache: ReferenceCache | None, start: Beside, compute: Compute) -> None:
        self.cache, self.start, self._compute = cache, start, compute

    def of(self, model: Any, lists: Sequence[TokenList], untouched: bool) -> list[Tensor]:
        """(N,) of each list.

        Args:
            model: what trains.
            lists: those of one update, or of one batch to be measured.
            untouched: whether no update was made yet.
        """

        def compute(some: Sequence[TokenList]) -> list[Tensor]:
            with self.start.beside(model, untouched) as reference:
                return self._compute(reference, some)

        return compute(lists) if self.cache is None else self.cache.logps(lists, compute)
