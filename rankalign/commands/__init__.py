"""One module a command: EXAMPLE, add_arguments(parser), run(args) -> result, show(result) for people."""

from __future__ import annotations

from typing import Any


def show_facts(result: dict[str, Any]) -> None:
    """Print a flat result as aligned ``name  value`` lines."""
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)
