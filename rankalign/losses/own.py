"""A function of the user's as a loss: what it reads is found by a trial, and what it gets wrong is said before a run.

A trial on two small lists tells whether it reads the reference or tokens, and whether a list in which nothing is better
than anything teaches it. It refuses what would train on nonsense: a result that is not one number a prompt, that has no
gradient, or that depends on what lies behind ``Ranked.mask``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankalign.errors import InputError
from rankalign.losses.core import Loss, WithNLL
from rankalign.losses.ranked import Ranked

_REFERENCE, _TOKENS = ("ref_logps", "ref_token_logps"), ("token_logps", "ref_token_logps")


class Own:
    """The function under its name, its keywords with defaults being its settings as those of any loss are.

    Args:
        function: ``(Ranked, **keywords) -> (P,)``.
        name: for messages.

    Raises:
        InputError: it does not take a ``Ranked``, or has a keyword without a default.
    """

    def __init__(self, function: Callable[..., Tensor], name: str) -> None:
        self._function, self.name = function, name
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__doc__ = inspect.getdoc(function) or f"{name}, a loss of your own."
        taken = [*inspect.signature(function).parameters.values()]
        if not taken or taken[0].kind in (taken[0].KEYWORD_ONLY, taken[0].VAR_KEYWORD):
            raise InputError(f"loss {name}: its first argument is a Ranked, and it takes none")
        named = [each for each in taken[1:] if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        for each in named:
            if each.default is each.empty:
                raise InputError(f"loss {name}: {each.name!r} has no default; give it one, which a setting can change")
        keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in named]
        self.__signature__ = inspect.Signature(
            [inspect.Parameter("ranked", inspect.Parameter.POSITIONAL_ONLY), *keywords]
        )

    def __call__(self, ranked: Ranked, **keywords: Any) -> Tensor:
        """(P,) the loss.

        Raises:
            InputError: it is not of that shape, or not finite.
        """
        loss = self._function(ranked, **keywords)
        if not isinstance(loss, Tensor) or loss.shape != ranked.scores.shape[:1]:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise InputError(
                f"loss {self.name}: must return one number a prompt, a tensor ({len(ranked.scores)},), not {found}"
            )
        return loss


def own_loss(function: Callable[..., Tensor], name: str) -> Loss:
    """What a registry would hold of the function.

    An attribute of the function's (``fn.needs_reference``, ``fn.needs_tokens``, ``fn.alone``) wins over the trial, as
    for one that reads the reference under a keyword alone.

    Args:
        function: ``(Ranked, **keywords) -> (P,)``.
        name: for messages.

    Raises:
        InputError: what it returns is no loss of its lists.
    """
    own = Own(function, name)
    read = _try(own)
    told = {
        "needs_reference": bool(read & {*_REFERENCE}),
        "needs_tokens": bool(read & {*_TOKENS}),
        "alone": _learns_from_ties(own),
    }
    return Loss(WithNLL(own), **{key: bool(getattr(function, key, value)) for key, value in told.items()})


def _try(own: Own) -> set[str]:
    """Call it on two lists, of three answers and of two; the names of what it read."""
    read: set[str] = set()

    class Watched(Ranked):
        """Notes what is read of it."""

        def __getattribute__(self, field: str) -> Any:
            read.add(field)
            return super().__getattribute__(field)

    lists = [_lists(behind) for behind in (0.0, 7.0)]
    watched = Watched(**{item.name: getattr(lists[0], item.name) for item in dataclasses.fields(Ranked)})
    Watched.__name__ = Watched.__qualname__ = "Ranked"  # in messages of Python's own
    read.clear()
    loss, other = own(watched), own(lists[1])
    if not loss.requires_grad:
        raise InputError(f"loss {own.name}: has no gradient; it must depend on ranked.logps (or token_logps)")
    if not torch.isfinite(loss).all():
        raise InputError(f"loss {own.name}: is not finite ({loss.tolist()}) on lists of usual numbers")
    if not torch.equal(loss, other):
        raise InputError(
            f"loss {own.name}: changes with entries behind Ranked.mask, where no candidate is; mask them, as with "
            "torch.where(ranked.mask, ..., 0)"
        )
    return read


def _lists(behind: float) -> Ranked:
    """Two prompts; ``behind`` fills the place of the third answer, which the second prompt does not have."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    lengths = torch.tensor([[3, 5, 4], [2, 4, 1 + int(behind)]])
    tokens = torch.linspace(-2.0, -0.2, 30).reshape(2, 3, 5)
    tokens = torch.where(mask[:, :, None], tokens, -behind).requires_grad_()
    counted = torch.arange(5) < lengths[:, :, None]
    reference = torch.where(mask[:, :, None], tokens.detach() * 0.9 - 0.1, -behind)
    sums = [torch.where(counted, each, 0.0).sum(2) for each in (tokens, reference)]
    scores = torch.tensor([[2.0, 0.5, 1.0], [0.0, 1.0, behind]])
    return Ranked(
        sums[0], lengths, scores, mask, sums[1], torch.tensor([4, 6]), tokens, reference, torch.tensor([1, 2])
    )


def _learns_from_ties(own: Own) -> bool:
    """Whether a list in which no answer beats another has a gradient."""
    lists = _lists(0.0)
    tied = dataclasses.replace(lists, scores=torch.zeros_like(lists.scores))
    try:
        loss = own(tied).sum()
        (gradient,) = torch.autograd.grad(loss, lists.token_logps, allow_unused=True)  # type: ignore[arg-type]
    except (InputError, RuntimeError):  # it cannot do with ties, or nothing is left of the graph
        return False
    return gradient is not None and bool(gradient.abs().sum() > 0)
