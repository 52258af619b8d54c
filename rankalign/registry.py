"""Names to things that are imported only when asked for, so that a command starts fast and extras stay optional."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rankalign.errors import InputError, missing_extra

MANY = 60  # names that still fit a message: all losses do, the settings of training do not
SURE = 0.8  # share of letters in common from which a misspelling has one answer: 'learning_rat', 'wandbb', 'rhf' (0.86)


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    Attributes:
        target: ``module:attribute``, imported on first use.
        summary: one line for ``rankalign ls``.
        extra: the extra whose packages it needs, or empty.
    """

    target: str
    summary: str
    extra: str = ""


class Registry(dict[str, Entry]):
    """A dictionary of entries of one kind.

    Args:
        what: the kind in the singular, for messages ("engine").
        entries: the registered names.
    """

    def __init__(self, what: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.what = what

    def load(self, name: str) -> Any:
        """Import and return what ``name`` stands for.

        Raises:
            InputError: unknown name (with the nearest known one), or an extra that is not installed.
        """
        if name not in self:
            raise InputError(f"unknown {self.what} {name!r}{did_you_mean(name, self)}")
        entry = self[name]
        module, attribute = entry.target.split(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            # A file of ours that is missing is a bug.
            if entry.extra and not (error.name or "").startswith("rankalign"):
                raise missing_extra(f"{self.what} {name!r}", entry.extra) from error
            raise


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with up to three names, or, where nothing is near, what there is; to end a message.

    Of many names the nearest three stand for all: 180 settings on a screen help nobody.
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3)
    if near:
        sure = difflib.SequenceMatcher(None, word, near[0]).ratio() >= SURE
        return f" (did you mean {' or '.join(map(repr, near[:1] if sure else near))}?)"
    if len(names) <= MANY:
        return f" (one of: {', '.join(names)})"
    nearest = difflib.get_close_matches(word, names, n=3, cutoff=0.0)
    return f" (nearest of {len(names)}: {', '.join(nearest)})"
