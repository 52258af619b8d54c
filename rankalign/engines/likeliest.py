"""Log-probabilities of likely tokens, told in texts."""

from __future__ import annotations

import math
from collections.abc import Iterable


def merged(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probability by text: tokens that read the same (``4`` with and without its blank) share theirs.

    Args:
        pairs: text and log-probability, nats.
    """
    found: dict[str, float] = {}
    for text, value in pairs:
        if (known := found.get(text)) is not None:
            low, high = sorted((known, value))
            value = high + math.log1p(math.exp(low - high))
        found[text] = value
    return found
