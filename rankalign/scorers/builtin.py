"""Functions ready for scorer ``function``: ``function: rankalign.scorers.builtin:vader``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rankalign.data.words import pieces
from rankalign.errors import missing_extra


def vader(samples: Sequence[str], outputs: Sequence[str], **metadata: Any) -> list[float]:
    """Sentiment of each response, from -1 to 1: VADER's compound score (Hutto and Gilbert 2014), a lexicon with rules.

    Raises:
        InputError: the package nltk-vader-sentiment is not installed.
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in outputs]


@functools.cache
def _analyzer() -> Any:
    try:
        from vader import SentimentIntensityAnalyzer
    except ImportError:
        raise missing_extra("function rankalign.scorers.builtin:vader", "demo") from None
    return SentimentIntensityAnalyzer()


def written_by(samples: Sequence[str], policies: Sequence[str], policy: str = "dataset") -> list[float]:
    """1 for each response of one policy, 0 for those of all others: SPIN's preference for what people wrote over what
    the model writes (Chen et al. 2024, arXiv:2401.01335).

    Args:
        samples: one a response.
        policies: who wrote each.
        policy: whose are preferred.
    """
    return [float(name == policy) for name in policies]


def words(samples: Sequence[str], outputs: Sequence[str], **metadata: Any) -> list[float]:
    """How many words each response has: the judge to suspect when a better one agrees with it."""
    return [float(len(pieces(text))) for text in outputs]
