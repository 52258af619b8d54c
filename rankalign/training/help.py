"""The help of ``rankalign train``: the settings that matter first, the others by group; text alone, no library."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from rankalign.registry import did_you_mean
from rankalign.training.ppo_settings import PPOSettings
from rankalign.training.settings import (
    DataSettings,
    LossSettings,
    ModelSettings,
    RunSettings,
    TrainerDefaults,
)

WIDTH = 80
"""Columns of a terminal that nobody has drawn wider."""
FIRST = (
    "model", "data", "eval_split", "method", "loss", "beta", "learning_rate", "num_train_epochs", "use_lora",
    "output_dir",
)  # fmt: skip
"""What most first runs set, in the order in which one thinks of it."""
GROUPS: dict[str, tuple[type[Any], str]] = {
    "model": (ModelSettings, "what is trained, and which part of it"),
    "data": (DataSettings, "which candidates are read, and how they become tokens"),
    "loss": (LossSettings, "what is learned"),
    "run": (RunSettings, "how a run goes, and what it measures"),
    "trainer": (TrainerDefaults, "flags of transformers' trainer with defaults of ours"),
    "ppo": (PPOSettings, "settings of --method ppo alone"),
}
ALL = "all"


def first() -> str:
    """The settings that matter first, with their defaults, and the names of all others by group."""
    told = {item.name: item for group, _ in GROUPS.values() for item in dataclasses.fields(group)}
    told |= {item.name: item for item in _fields("trainer")}  # whose defaults PPO has its own of
    lines = ["what matters first:", *(line for name in FIRST for line in _entry(told[name])), ""]
    lines += wrap("more, by group; `rankalign train --help GROUP` explains one, `--help all` every flag there is:")
    for name, (_, summary) in GROUPS.items():
        names = " ".join(f"--{item.name}" for item in _fields(name) if item.name not in FIRST)
        lines += ["", *wrap(f"{name}: {summary}", "  "), *wrap(names, "    ")]
    return "\n".join([*lines, "", *wrap("Every other flag of transformers' TrainingArguments works beside these.")])


def group(name: str) -> str:
    """One group, each setting explained.

    Raises:
        ValueError: there is no such group; the message names those that there are.
    """
    if name not in GROUPS:
        raise ValueError(f"--help {name}: no such group{did_you_mean(name, [*GROUPS, ALL])}")
    lines = [line for item in _fields(name) for line in _entry(item)]
    return "\n".join([*wrap(f"{name}: {GROUPS[name][1]}"), "", *lines])


def _fields(name: str) -> Iterable[dataclasses.Field[Any]]:
    return dataclasses.fields(GROUPS[name][0])


def _entry(item: dataclasses.Field[Any]) -> Iterator[str]:
    default = "" if item.default in ("", None, "{}", dataclasses.MISSING) else f" ({item.default})"
    yield from entry(f"--{item.name}", f"{item.metadata['help']}{default}")


def entry(name: str, text: str) -> list[str]:
    """A name and its text beside it, or below where the name is long."""
    column = 24
    lines = textwrap.wrap(text, WIDTH - column, break_long_words=False, break_on_hyphens=False) or [""]
    if len(name) + 2 >= column:
        return [f"  {name}", *(" " * column + line for line in lines)]
    return [f"  {name:<{column - 2}}{lines[0]}", *(" " * column + line for line in lines[1:])]


def wrap(text: str, indent: str = "") -> list[str]:
    """One paragraph at most :data:`WIDTH` columns wide."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
