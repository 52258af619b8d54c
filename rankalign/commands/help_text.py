"""How every command's ``--help`` looks: 80 columns, the usage in one line, an example that can be copied."""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
from collections.abc import Iterable
from typing import Any

WIDTH = 80
MOST = 40
"""Letters of choices that still stand in the place of a value."""
_KINDS: dict[Any, str] = {int: "N", float: "X"}


class Formatter(argparse.HelpFormatter):
    """Paragraphs are filled, what is indented stays as it is, and the usage names what stands without a flag."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=24, width=WIDTH, **more)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None = None
    ) -> None:
        """The positional arguments; flags are listed below, and need no second list."""
        super().add_usage(usage, [action for action in actions if not action.option_strings], [], prefix)

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        if usage is not None:
            return super()._format_usage(usage, actions, groups, prefix)
        return f"{super()._format_usage(usage, actions, groups, prefix).rstrip()} [options]\n\n"

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        """What stands for a value: its choices where they are few, with which the help names them; else its kind, as
        the name of the flag stands beside it already."""
        if action.metavar is not None or (action.choices and not _many(action)):
            return super()._metavar_formatter(action, default_metavar)
        name = _KINDS.get(action.type, "VALUE") if action.option_strings else default_metavar
        return lambda size: (name,) * size

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The flag in one spelling: both marks between words are read."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        spelt = {name.replace("-", "_"): name for name in reversed(action.option_strings)}
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(reversed(spelt.values())) + value

    def _get_help_string(self, action: argparse.Action) -> str:
        choices = ", ".join(map(str, action.choices or ()))
        return ": ".join(filter(None, (action.help, choices))) if _many(action) else (action.help or "")

    def _format_text(self, text: str) -> str:
        return f"{fill(text)}\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fill(text)


def _many(action: argparse.Action) -> bool:
    return len(",".join(map(str, action.choices or ()))) > MOST


def fill(text: str) -> str:
    """Paragraphs of a docstring at the width of a terminal; a line that is indented is code."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        code = any(line.startswith(" ") for line in paragraph.splitlines())
        found.append(
            paragraph
            if code
            else "\n".join(
                textwrap.wrap(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
            )
        )
    return "\n\n".join(found)


def _filled(line: str) -> str:
    return "\n".join(textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False))


def example(command: str) -> str:
    """A command line that a shell takes as it stands, on several lines where it is long."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    lines = ["  " + words[0]]
    for word in _with_values(words[1:]):
        if len(lines[-1]) + 1 + len(word) > WIDTH - 2:  # room for the mark at the end
            lines[-1] += " \\"
            lines.append("      " + word)
        else:
            lines[-1] += f" {word}"
    return "example:\n" + "\n".join(lines)


def _with_values(words: list[str]) -> list[str]:
    """Flags with what follows them, so that no line ends between the two."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith("--") and " " not in found[-1] and not word.startswith("--"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found
