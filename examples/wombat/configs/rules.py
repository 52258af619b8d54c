"""A judge that needs no model: four crude rules, a point each. It knows nothing of what is true."""

from __future__ import annotations

import re
from typing import Any


def rules(samples: list[str], prompts: list[str], outputs: list[str], **metadata: Any) -> list[dict[str, float]]:
    """Points of each answer by rule; their sum is the score."""
    return [grade(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def grade(prompt: str, output: str) -> dict[str, float]:
    """On the topic, short, without repetition, and brought to an end."""
    asked, said = (re.findall(r"[a-z]{4,}", text.lower()) for text in (prompt, output))
    words = output.split()
    return {
        "topic": float(bool(set(asked) & set(said))),
        "brevity": min(1.0, 30 / len(words)) if words else 0.0,
        "variety": len(set(words)) / len(words) if words else 0.0,
        "ending": float(output.rstrip().endswith((".", "!", "?", '"'))),
    }
