"""rankalign: align language models by ranking. See README.md; the pieces import nothing heavy until they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankalign.api import train

__version__ = "0.1.0"
__all__ = ["__version__", "train"]


def __getattr__(name: str) -> Any:
    """``rankalign.train``, imported when it is first asked for."""
    if name != "train":
        raise AttributeError(f"module 'rankalign' has no attribute {name!r}")
    from rankalign.api import train

    return train
