"""Folders that runs write into: an earlier run gives way when asked for, and what is no run's is never replaced."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from rankalign.errors import InputError
from rankalign.storage.manifest import CLAIM

MARKS = ("manifest.json", "log.jsonl", "ledger.jsonl", "checkpoint-*", CLAIM)
"""What a run leaves, from its first step on."""
WRITTEN = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer*.json", "README.md")
"""What a run writes in the end, under names that other tools use as well."""


def begin(folder: Path, reads: Mapping[str, str | None], overwrite: bool) -> None:
    """Make way for a run, or leave in place what it goes on with.

    Args:
        folder: where the run writes.
        reads: by flag, what it reads: paths, or names that are none.
        overwrite: remove what an earlier run left; a folder without a run's traces is left as it is.

    Raises:
        InputError: the run would write over what it reads, or over files that no run left.
    """
    check_reads(folder, reads, overwrite)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any(path for mark in MARKS for path in folder.glob(mark)):
        if theirs := [path.name for name in WRITTEN for path in sorted(folder.glob(name))]:
            raise InputError(f"{folder} holds {', '.join(theirs[:3])}, which no run left there; name another output")
    elif overwrite:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise InputError(f"--overwrite would remove {folder}, the folder you are in; name another output")
        shutil.rmtree(folder)


def check_reads(folder: Path, reads: Mapping[str, str | None], overwrite: bool) -> None:
    """Refuse an output that is an input too.

    Raises:
        InputError: it is, or ``overwrite`` would remove an input with it.
    """
    place = folder.resolve()
    for name, text in reads.items():
        for path in _paths(text or ""):
            if path == place:
                raise InputError(f"{folder} is what {name} names, and would be written over; name another output")
            if overwrite and path.is_relative_to(place):
                raise InputError(f"--overwrite would remove {path}, which {name} names, with {folder}; move it away")


def _paths(text: str) -> list[Path]:
    """The paths of this machine in a setting; mixtures name several, with parts and weights behind."""
    words = [text, *(re.split("[#@]", word)[0] for word in re.split(r"[\s,]+", text))]
    return [Path(word).resolve() for word in dict.fromkeys(words) if word and Path(word).exists()]
