"""What all losses share: safe reads of a padded list, pairs, reductions, and losses that are sums of named terms.

Entries outside ``Ranked.mask`` may hold anything, NaN included. Every read here replaces them *before* arithmetic:
a NaN that meets arithmetic first comes back through the gradient of ``torch.where`` as 0 x NaN.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rankalign.errors import InputError
from rankalign.losses.ranked import Ranked

Pairs: TypeAlias = Literal["all", "best-worst"]
Reduction: TypeAlias = Literal["mean", "sum"]
Terms: TypeAlias = Mapping[str, tuple[float | Tensor, Tensor]]
P = ParamSpec("P")

EXPONENT_LIMIT = 80.0  # e^88 is the end of fp32; a loss beyond this is astronomical either way
SCORE_LIMIT = 1e12  # a gap of scores times a log-prob, and the gradient of that, must stay far below 3e38, fp32's end


class Summed(Generic[P]):
    """A loss that is a weighted sum of named terms; decorates a function that returns ``{name: (weight, (P,) term)}``.

    Calling it gives the sum; :meth:`parts` gives the terms without their weights, for logs.
    """

    def __init__(self, terms: Callable[P, Terms]) -> None:
        functools.update_wrapper(self, terms)
        self._terms = terms

    def __call__(self, *args: P.args, **keywords: P.kwargs) -> Tensor:
        """(P,) weighted sum of the terms."""
        first, *rest = (weight * term for weight, term in self._terms(*args, **keywords).values())
        return sum(rest, start=first)

    def parts(self, *args: P.args, **keywords: P.kwargs) -> dict[str, Tensor]:
        """Each term, (P,), before its weight."""
        return {name: term for name, (_, term) in self._terms(*args, **keywords).items()}


class WithNLL:
    """A loss plus ``nll_weight`` times the NLL of the best response, RPO's likelihood term for any loss.

    Pang et al. 2024, Iterative Reasoning Preference Optimization (arXiv:2404.19733), eq. 1: DPO plus the winner's NLL a
    token. At weight 0, the default, the loss is the function's own, to the bit.

    Args:
        function: the loss, whose keywords are kept; two are added: ``nll_weight``, and ``nll_reduction``, ``mean`` over
            the best response's tokens or their ``sum``.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        own, more = inspect.signature(function), inspect.signature(self._likelihood)
        added = [p for p in more.parameters.values() if p.kind is p.KEYWORD_ONLY]
        self.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])

    def __call__(
        self, ranked: Ranked, *, nll_weight: float = 0.0, nll_reduction: Reduction = "mean", **keywords: Any
    ) -> Tensor:
        """(P,) the loss."""
        loss = self._function(ranked, **keywords)
        likelihood = self._likelihood(ranked, nll_weight=nll_weight, nll_reduction=nll_reduction)
        return loss if likelihood is None else loss + nll_weight * likelihood

    def parts(
        self, ranked: Ranked, *, nll_weight: float = 0.0, nll_reduction: Reduction = "mean", **keywords: Any
    ) -> dict[str, Tensor]:
        """Each term, (P,), before its weight; none for a loss that is one term."""
        likelihood = self._likelihood(ranked, nll_weight=nll_weight, nll_reduction=nll_reduction)
        own = self._function.parts(ranked, **keywords) if isinstance(self._function, Summed) else {}
        if likelihood is None:
            return own
        return (own or {"rank_loss": self._function(ranked, **keywords)}) | {"nll_loss": likelihood}

    @staticmethod
    def _likelihood(ranked: Ranked, *, nll_weight: float = 0.0, nll_reduction: Reduction = "mean") -> Tensor | None:
        check(nll_weight >= 0, f"loss keyword nll_weight={nll_weight} must be at least 0")
        check_choice("nll_reduction", nll_reduction, ("sum", "mean"))
        return best_nll(ranked, nll_reduction) if nll_weight else None


@dataclass(frozen=True)
class Loss:
    """One registered loss.

    Attributes:
        function: ``(Ranked, **keywords) -> (P,)``; its keywords and their defaults are the loss's whole config.
        needs_reference: it reads ``Ranked.ref_logps``.
        needs_tokens: it reads ``Ranked.token_logps``, and of the reference too where it needs one.
        needs_squares: it reads ``Ranked.log_squares``.
        needs_kls: it reads ``Ranked.ref_kls``, for which the reference runs beside the policy.
        needs_own: it reads ``Ranked.own``.
        alone: it learns from a response that beats no other; all that only rank are exactly 0 on such a list.
    """

    function: Callable[..., Tensor]
    needs_reference: bool = False
    alone: bool = False
    needs_tokens: bool = False
    needs_squares: bool = False
    needs_kls: bool = False
    needs_own: bool = False

    @property
    def summary(self) -> str:
        """One line for ``rankalign ls losses``: the first of the docstring."""
        return (inspect.getdoc(self.function) or "").splitlines()[0]

    @property
    def beyond(self) -> list[str]:
        """The fields of :class:`Ranked` that it reads of whole distributions, in the order of values."""
        wanted = {"log_squares": self.needs_squares, "ref_kls": self.needs_kls}
        return [name for name, needed in wanted.items() if needed]

    @property
    def defaults(self) -> dict[str, float | str | None]:
        """Keyword names with their defaults, in order."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def parts(self, ranked: Ranked, **keywords: Any) -> dict[str, Tensor]:
        """The terms that the loss is a weighted sum of, (P,) each, before their weights; none where it is one term."""
        of_function: Callable[..., dict[str, Tensor]] | None = getattr(self.function, "parts", None)
        return of_function(ranked, **keywords) if of_function else {}

    def needs_pairs(self, keywords: Mapping[str, object]) -> bool:
        """Whether data in which no response beats another teaches it nothing: a ``threshold`` splits good from bad
        without a rival."""
        return not self.alone and keywords.get("threshold") is None


def check(ok: bool, message: str) -> None:
    """Raise InputError with ``message`` unless ``ok``: a keyword of a loss comes from the user's config."""
    if not ok:
        raise InputError(message)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``allowed``."""
    check(value in allowed, f"loss keyword {name}={value!r} must be one of: {', '.join(allowed)}")


def check_smoothing(label_smoothing: float) -> None:
    """Raise InputError unless ``label_smoothing``, the chance that a label is flipped, is in [0, 0.5)."""
    check(0 <= label_smoothing < 0.5, f"loss keyword label_smoothing={label_smoothing} must be in [0, 0.5)")


def present(ranked: Ranked, values: Tensor) -> Tensor:
    """(P, N) ``values`` in the dtype of the log-probs, 0 where there is no candidate."""
    values = values.to(ranked.logps.dtype)
    return torch.where(ranked.mask, values, torch.zeros_like(values))


def lengths(ranked: Ranked) -> Tensor:
    """(P, N) response lengths in tokens, at least 1 so that they can divide."""
    return present(ranked, ranked.lengths).clamp(min=1)


def policy_scores(ranked: Ranked, length_penalty: float) -> Tensor:
    """(P, N) log-probs over lengths ** length_penalty: 0 gives sums, 1 means a token."""
    return present(ranked, ranked.logps) / lengths(ranked) ** length_penalty


def reference_logps(ranked: Ranked) -> Tensor:
    """(P, N) log-probs under the reference, 0 where there is no candidate.

    Raises:
        ValueError: the list carries none.
    """
    if ranked.ref_logps is None:
        raise ValueError("this loss needs Ranked.ref_logps")
    return present(ranked, ranked.ref_logps)


def score_values(ranked: Ranked) -> Tensor:
    """(P, N) scores to calculate with, 0 where there is no candidate.

    Scores are any finite doubles. A list with one beyond :data:`SCORE_LIMIT` is scaled down to it as a whole, which
    keeps its order and ties; all others stay as they are, to the bit.
    """
    return present(ranked, _bounded_scores(ranked))


def _bounded_scores(ranked: Ranked) -> Tensor:
    """(P, N) scores of at most :data:`SCORE_LIMIT`, in their own dtype, 0 where there is no candidate."""
    scores = torch.where(ranked.mask, ranked.scores, torch.zeros_like(ranked.scores))
    return scores * (SCORE_LIMIT / scores.abs().amax(1, keepdim=True).clamp(min=SCORE_LIMIT))


def score_gaps(ranked: Ranked, pairs: Tensor) -> Tensor:
    """(P, N, N) winner's score minus loser's, 0 where there is no pair; subtracted before the dtype is narrowed."""
    return margins(_bounded_scores(ranked), pairs).to(ranked.logps.dtype)


def deviations(ranked: Ranked) -> Tensor:
    """(P, N) scores minus the list's mean, 0 where there is no candidate; subtracted before the dtype is narrowed."""
    scores = _bounded_scores(ranked)
    mean = scores.sum(1, keepdim=True) / ranked.mask.sum(1, keepdim=True).clamp(min=1)
    return present(ranked, scores - mean)


def score_target(ranked: Ranked, temperature: float) -> Tensor:
    """(P, N) softmax of scores / temperature over the candidates, even over the best at 0; zero elsewhere."""
    if temperature:
        return present(ranked, masked(score_values(ranked) / temperature, ranked.mask).softmax(1))
    top = best_of_all(ranked)
    return present(ranked, top) / top.sum(1, keepdim=True).clamp(min=1)


def best_of_all(ranked: Ranked) -> Tensor:
    """(P, N) bool: the candidates that none beats."""
    return ranked.mask & ~ranked.pairs.any(1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values``, and outside the mask the lowest finite number, which a softmax takes for none."""
    return values.masked_fill(~mask, torch.finfo(values.dtype).min)


def over_candidates(ranked: Ranked, values: Tensor, reduction: Reduction = "mean") -> Tensor:
    """(P,) sum or mean of (P, N) values over the candidates; 0 for a list without any."""
    check_choice("reduction", reduction, ("mean", "sum"))
    total = present(ranked, values).sum(1)
    return total if reduction == "sum" else total / ranked.mask.sum(1).clamp(min=1)


def log_ratios(ranked: Ranked) -> Tensor:
    """(P, N) log(policy / reference) of each response, nats."""
    return present(ranked, ranked.logps) - reference_logps(ranked)


def nll(ranked: Ranked, reduction: Reduction) -> Tensor:
    """(P, N) negative log-likelihood of each response, summed over its tokens or their mean."""
    check_choice("sft_reduction", reduction, ("sum", "mean"))
    return -policy_scores(ranked, 1.0 if reduction == "mean" else 0.0)


def best_nll(ranked: Ranked, reduction: Reduction) -> Tensor:
    """(P,) :func:`nll` of the best response, the first of equals."""
    return nll(ranked, reduction).gather(1, ranked.best.unsqueeze(1)).squeeze(1)


def chosen_pairs(ranked: Ranked, pairs: Pairs) -> Tensor:
    """(P, N, N) bool, winner first: every strict pair, or the best against the worst only."""
    check_choice("pairs", pairs, ("all", "best-worst"))
    if pairs == "all":
        return ranked.pairs
    index = torch.arange(ranked.logps.shape[1], device=ranked.logps.device)
    best, worst = index == ranked.best.unsqueeze(1), index == ranked.worst.unsqueeze(1)
    return ranked.pairs & best.unsqueeze(2) & worst.unsqueeze(1)


def sides(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(P, N) values as the winner's and the loser's of each pair, (P, N, N) both, 0 where there is no pair."""
    zero = torch.zeros_like(values[:, :1, None])
    return torch.where(pairs, values.unsqueeze(2), zero), torch.where(pairs, values.unsqueeze(1), zero)


def margins(values: Tensor, pairs: Tensor) -> Tensor:
    """(P, N, N) winner's value minus loser's, 0 where there is no pair."""
    chosen, rejected = sides(values, pairs)
    return chosen - rejected


def over_pairs(terms: Tensor, pairs: Tensor, reduction: Reduction) -> Tensor:
    """(P,) sum or mean of (P, N, N) ``terms`` over the pairs; exactly 0 for a list without any."""
    check_choice("reduction", reduction, ("mean", "sum"))
    total = torch.where(pairs, terms, torch.zeros_like(terms)).sum((1, 2))
    return total if reduction == "sum" else total / pairs.sum((1, 2)).clamp(min=1)


def usable(ranked: Ranked, values: Tensor) -> Tensor:
    """(P,) ``values``, exactly 0 for lists in which no candidate beats another."""
    return torch.where(ranked.pairs.any(2).any(1), values, torch.zeros_like(values))


def logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(logits) with a share ``label_smoothing`` of the labels taken to be flipped."""
    check_smoothing(label_smoothing)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
