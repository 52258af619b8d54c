"""The table of what fits in docs/scaling.md: `python -m docs.fits` writes it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from rankalign.training.arguments import parse_settings
from rankalign.training.plan.cards import memory_of
from rankalign.training.plan.on_card import Setup, made_up, stretches

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- begin: python -m docs.fits -->", "<!-- end -->"
METHODS = {
    "full": {},
    "LoRA": {"use_lora": True},
    "QLoRA": {"use_lora": True, "load_in_4bit": True},
}
PLACES = {"1 x 24 GB": ("4090", 1), "1 x 80 GB": ("h100", 1), "8 x 80 GB": ("h100", 8)}
MODELS = ("llama-8b", "llama-70b")


def sharding(method: str, devices: int) -> str:
    """As the command line takes it: weights in 4 bits are not sharded."""
    return "none" if devices == 1 else "ddp" if method == "QLoRA" else "fsdp2"


def cell(model: str, method: str, place: str) -> str:
    """GiB of a card at the peak, and whether that fits."""
    card, devices = PLACES[place]
    common = {"model": model, "use_cpu": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    config = parse_settings({**common, **METHODS[method]})
    setup = Setup(memory_of(card), devices, sharding(method, devices))
    peak = max(map(Counter.total, stretches(config, made_up(512, 256, 4, 1), setup, again=True).values()))
    return f"{'yes' if peak <= setup.room else 'no'}: {peak / 2**30:.1f} GiB ({setup.sharding})"


def table() -> str:
    """All of it, in Markdown."""
    lines = [f"| model | method | {' | '.join(PLACES)} |", "|---|---|" + "---|" * len(PLACES)]
    for model in MODELS:
        for method in METHODS:
            lines.append(f"| {model} | {method} | {' | '.join(cell(model, method, place) for place in PLACES)} |")
    return "\n".join(lines)


def on_page() -> str:
    """The table that the page has."""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{PAGE} has lost its marks"
    return found[1]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(on_page(), table()), encoding="utf-8")
