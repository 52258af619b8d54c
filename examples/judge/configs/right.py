"""Whether a verdict is what people said."""

from __future__ import annotations

from typing import Any

from rankalign.scorers.verdicts import LETTERS, parse_letter


def right(samples: list[str], outputs: list[str], label: list[str], **metadata: Any) -> list[float]:
    """1 for the right letter; 0 for the other one, and for what cannot be read."""
    return [float(parse_letter(text) == LETTERS[letter]) for text, letter in zip(outputs, label, strict=True)]
