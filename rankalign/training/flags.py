"""How a setting of training is declared: its default, and the one line that documents it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def flag(default: Any, text: str) -> Any:
    """A dataclass field whose help text is its documentation."""
    return field(default=default, metadata={"help": text})
