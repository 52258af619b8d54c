"""Weighted sums of losses: ``dpo+0.2*sft+0.1*bco``, a list with weights in YAML, or TRL's two lists.

Wang et al. 2024, Mixed Preference Optimization (arXiv:2411.10442), is ``0.8*dpo+0.2*bco+sft``; ``dpo+sft`` is Iterative
RPO (arXiv:2404.19733).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from rankalign.errors import InputError
from rankalign.losses.core import Loss
from rankalign.losses.ranked import Ranked

Weights: TypeAlias = dict[str, float]

# A name, or a function of the user's own: module:name or path/file.py:name.
_NAME = r"[^\s+*:]+:[^\s+*:]+|[A-Za-z_]\w*"
_TERM = re.compile(rf"\s*(?:([\d.]+(?:[eE][+-]?\d+)?)\s*\*\s*)?({_NAME})\s*(\+|$)")
_FORM = "write a mixture as dpo+0.2*sft"


def parse(text: str) -> Weights:
    """Weights by name of ``[weight*]name+...``; one name alone has weight 1.

    Raises:
        InputError: it is not of that form, names a loss twice, or has a weight that is not above 0.
    """
    weights: Weights = {}
    at, more = 0, True
    while more:
        found = _TERM.match(text, at)
        if found is None:
            raise InputError(f"loss {text!r}: {text[at:].strip() or 'nothing'!r} is not a loss with a weight; {_FORM}")
        number, name, plus = found.groups()
        _add(weights, name, 1.0 if number is None else _number(number), text)
        at, more = found.end(), bool(plus)
    return weights


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"loss weight {value!r} is not a number; {_FORM}") from None


def _add(weights: Weights, name: str, weight: float, where: object) -> None:
    if name in weights:
        raise InputError(f"loss {where!r} names {name!r} twice; give it one weight")
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"loss {where!r}: the weight of {name!r} must be a number above 0, found {weight:g}")
    weights[name] = weight


def compose(listed: Sequence[Any], weights: Sequence[Any] | None = None) -> tuple[str, dict[str, Any]]:
    """A list of losses as the text that :func:`parse` reads, and the keywords that its entries hold.

    Args:
        listed: of names, ``{name: weight}``, or ``{"loss": name, "weight": w, keyword: value, ...}``.
        weights: TRL's ``loss_weights``, one for each; then the entries are names.

    Returns:
        The text, and keywords under ``name.keyword``.

    Raises:
        InputError: an entry of another form, or weights that do not go with the entries.
    """
    found: Weights = {}
    options: dict[str, Any] = {}
    if weights is not None and (len(weights) != len(listed) or not all(isinstance(entry, str) for entry in listed)):
        raise InputError(f"{len(weights)} loss_weights for the losses {list(listed)}: give one weight for each name")
    for i, entry in enumerate(listed):
        name, weight, own = _entry(entry)
        _add(found, name, weight if weights is None else _number(weights[i]), list(listed))
        options.update({f"{name}.{keyword}": value for keyword, value in own.items()})
    if not found:
        raise InputError(f"the list of losses is empty; {_FORM}")
    return "+".join(name if weight == 1 else f"{weight!r}*{name}" for name, weight in found.items()), options


def _entry(entry: Any) -> tuple[str, float, dict[str, Any]]:
    if isinstance(entry, str):
        ((name, weight),) = parse(entry).items() if "+" not in entry else [(entry, 1.0)]
        return name, weight, {}
    if isinstance(entry, dict) and isinstance(entry.get("loss"), str):
        rest = {key: value for key, value in entry.items() if key not in ("loss", "weight")}
        return entry["loss"], _number(entry.get("weight", 1.0)), rest
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, weight),) = entry.items()
        return str(name), _number(weight), {}
    raise InputError(f"list of losses: {entry!r} is neither a name, nor name: weight, nor loss: name, weight: number")


@dataclass(frozen=True)
class Mixture(Loss):
    """A weighted sum of losses. Its parts are the losses, under their names.

    A keyword goes to every loss that has it; ``name.keyword`` to that loss alone, and comes first.

    Attributes:
        weighted: (weight, name, loss) of each.
    """

    weighted: tuple[tuple[float, str, Loss], ...] = ()

    @property
    def summary(self) -> str:
        """The sum, written out."""
        return "Sum of " + ", ".join(f"{weight:g} times {name}" for weight, name, _ in self.weighted) + "."

    @property
    def defaults(self) -> dict[str, float | str | None]:
        """Keywords of any of the losses, each with the first one's default, then those of one loss alone."""
        shared: dict[str, float | str | None] = {}
        for _, _, loss in reversed(self.weighted):
            shared.update(loss.defaults)
        apart = {f"{name}.{key}": value for _, name, loss in self.weighted for key, value in loss.defaults.items()}
        return shared | apart

    def needs_pairs(self, keywords: Mapping[str, object]) -> bool:
        """Whether there is a loss in it that data without a pair would teach nothing."""
        return any(loss.needs_pairs(_own(name, loss, keywords)) for _, name, loss in self.weighted)


class _Sum:
    """The function of a mixture."""

    def __init__(self, weighted: Sequence[tuple[float, str, Loss]]) -> None:
        self.weighted = weighted

    def __call__(self, ranked: Ranked, **keywords: Any) -> Tensor:
        """(P,) the weighted sum."""
        parts = self.parts(ranked, **keywords)
        first, *rest = (weight * parts[name] for weight, name, _ in self.weighted)
        return sum(rest, start=first)

    def parts(self, ranked: Ranked, **keywords: Any) -> dict[str, Tensor]:
        """(P,) each loss before its weight, under its name."""
        return {name: loss.function(ranked, **_own(name, loss, keywords)) for _, name, loss in self.weighted}


def _own(name: str, loss: Loss, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that go to one loss."""
    known = loss.defaults
    shared = {key: value for key, value in keywords.items() if key in known}
    return shared | {key: keywords[f"{name}.{key}"] for key in known if f"{name}.{key}" in keywords}


def mixture(weights: Mapping[str, float], losses: Mapping[str, Loss]) -> Loss:
    """The loss of these weights: the registered one itself where it is one with weight 1.

    Args:
        weights: by name, as :func:`parse` gives them.
        losses: where the names stand.
    """
    weighted = tuple((weight, name, losses[name]) for name, weight in weights.items())
    if len(weighted) == 1 and weighted[0][0] == 1:
        return weighted[0][2]
    return Mixture(
        function=_Sum(weighted),
        alone=all(loss.alone for _, _, loss in weighted),
        needs_reference=any(loss.needs_reference for _, _, loss in weighted),
        needs_tokens=any(loss.needs_tokens for _, _, loss in weighted),
        needs_squares=any(loss.needs_squares for _, _, loss in weighted),
        needs_kls=any(loss.needs_kls for _, _, loss in weighted),
        needs_own=any(loss.needs_own for _, _, loss in weighted),
        weighted=weighted,
    )
