"""Which of a reward model's outputs is the score: weights over several of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankalign.errors import InputError


def weighed_outputs(axis: str, names: Sequence[str]) -> dict[int, float]:
    """Weight by index of ``helpfulness:0.65,correctness:0.8`` (names or indices); nothing if ``axis`` is no list.

    Args:
        axis: the option.
        names: of the model's outputs, in order.

    Raises:
        InputError: there is no such output, one stands twice, or a weight is no number.
    """
    if axis in names or ":" not in axis:
        return {}
    found: dict[int, float] = {}
    for part in axis.split(","):
        name, _, weight = (word.strip() for word in part.rpartition(":"))
        index = names.index(name) if name in names else int(name) if name.isdigit() else len(names)
        if index >= len(names):
            raise InputError(f"axis: the model has no output {name!r}; it has {', '.join(names)}")
        if index in found:
            raise InputError(f"axis: output {name!r} stands twice")
        try:
            found[index] = float(weight)
        except ValueError:
            found[index] = math.nan
        if not math.isfinite(found[index]):
            raise InputError(f"axis: the weight of {name!r} is no finite number: {weight!r}")
    return found
