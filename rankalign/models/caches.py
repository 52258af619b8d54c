"""What a model calls the memory of the tokens it has read."""

from __future__ import annotations

import inspect
from typing import Any

# In turn: transformers before 5.24, state-space models there, and all models since.
_NAMES = ("past_key_values", "cache_params", "cache")


def cache_name(model: Any) -> str | None:
    """The argument of ``model.forward`` that takes a cache of keys and values; None for a model that has none.

    transformers 5.24 renamed it, and each release reads the other's name only with a warning at every call, if at all.
    """
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in accepted), None)
