"""An append-only, crash-safe store of finished work items beside the output they will become.

One line an item: eight hex digits of CRC-32, a blank, JSON ``[key, value]``. A batch of items is one ``write`` and one
``fsync``; whatever a kill or a power cut leaves behind is whole lines and at most one torn line at the end, which the
next opening cuts off. The first line is the header: the settings that the items depend on.

Where an item takes calls that cost money, :class:`Calls` keeps each of these, and each that failed with its reason.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rankalign.errors import InputError
from rankalign.storage.files import sync_directory, write_all
from rankalign.storage.journal_items import Items, Key, key_of, pack, unpack, whole_lines
from rankalign.storage.jsonl import dumps, loads

HEADER: Key = ("header",)
FORMAT = "journal"
"""Stands in the header of a stage's journal since items are keyed by their content; 0.1 had none."""


class Journal:
    """Work items of one output, exactly once.

    Use as a context manager; it holds an exclusive lock until closed.

    Args:
        path: the journal's file.
        header: the settings the items depend on, JSON-like; a journal begun under others is refused.
        fresh: throw away what is there.
        older: the header that version 0.1 would have written, whose journals go on under it.

    Attributes:
        done: value by key of all items on disk, where they are read when they are asked for.
        old: it is a journal of version 0.1, whose items are keyed by name and id alone.

    Raises:
        InputError: it cannot be written, another process holds it, its settings differ, or a line before the last is
            damaged.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], fresh: bool = False, older: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.old = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not truncated: whose it is shows when the lock is ours.
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        self.done = Items(self._handle, path)
        try:
            self._lock()
            if fresh:
                os.ftruncate(self._handle, 0)
            self._load(header, older)
        except BaseException:
            os.close(self._handle)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is writing it; wait for that one or stop it") from None
        try:
            ours = os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except FileNotFoundError:
            ours = False
        if not ours:  # its owner finished, and removed it, between our opening and our locking it
            raise InputError(f"{self.path}: another process has just finished it; run the same command again")

    def _load(self, header: dict[str, Any], older: dict[str, Any] | None) -> None:
        self._end, begun = 0, None
        for offset, line in whole_lines(self.path):
            key = key_of(line)
            if key == HEADER:
                _, begun = unpack(line) or (HEADER, None)
            else:
                self.done.note(key, offset)
            self._end = offset + len(line) + 1
        # What is appended next must begin a line of its own, so a torn one is cut off first.
        os.ftruncate(self._handle, self._end)
        os.lseek(self._handle, self._end, os.SEEK_SET)
        self.old = older is not None and begun is not None and FORMAT not in begun
        header = loads(dumps(older if self.old else header))  # as it reads back: tuples become lists
        if begun is None:
            self._write(pack(HEADER, header))
            # A new file's name lies in its folder: without this a power cut could lose the journal as a whole.
            sync_directory(self.path.parent)
        elif changed := differences(begun, header):
            raise InputError(
                f"{self.path}: begun with other settings ({'; '.join(changed[:4])}); "
                "go on with those, or start over with --overwrite"
            )

    def append(self, items: Iterable[tuple[Key, Any]], replace: bool = False) -> None:
        """Add items and sync them to disk. Keys already there are left as they are, or with ``replace`` get this value.

        Raises:
            InputError: the disk is full or the write failed; everything appended before is safe.
        """
        fresh = [(key, pack(key, value)) for key, value in items if replace or key not in self.done]
        offset = self._end
        self._write(b"".join(line for _, line in fresh))
        for key, line in fresh:  # not before: what counts as done is on disk
            self.done.note(key, offset)
            offset += len(line)

    def _write(self, block: bytes) -> None:
        try:
            write_all(self._handle, block)
            os.fsync(self._handle)
        except OSError as error:
            # Half a block would be a damaged line as soon as another one stands behind it.
            os.ftruncate(self._handle, self._end)
            os.lseek(self._handle, self._end, os.SEEK_SET)
            what = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise InputError(f"{self.path}: {what}; what was finished is safe, run the same command again") from None
        self._end += len(block)

    def close(self) -> None:
        """Release the lock."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclasses.dataclass
class Calls:
    """The calls of one policy or judge, each in the journal from the moment its reply came.

    Keys are content: whatever the reply depends on, so a changed input keeps what was paid for.

    Attributes:
        journal: where they are kept; None keeps nothing.
        name: of the policy or judge.
        skip: a call that fails for good is left out and counted; else it ends the run.
        retry: with ``skip``, ask again what failed in an earlier run.
    """

    journal: Journal | None = None
    name: str = ""
    skip: bool = False
    retry: bool = False

    def __len__(self) -> int:
        """How many replies are kept, those that no prompt asked for left aside."""
        return self.journal.done.calls[self.name, True] if self.journal else 0

    def __bool__(self) -> bool:
        return self.journal is not None

    @property
    def probed(self) -> bool:
        """Whether calls that no prompt asked for are kept: what they show of a server was said when they were made."""
        return bool(self.journal and self.journal.done.calls[self.name, False])

    def find(self, prompt: str, digest: str) -> Any:
        """The kept reply, or None."""
        return self.journal.done.get(("call", self.name, prompt, digest)) if self.journal else None

    def failure(self, prompt: str, digest: str) -> dict[str, Any] | None:
        """Why a call failed in an earlier run, where that is to be left as it is."""
        return self._failure(prompt, digest) if self.skip and not self.retry else None

    def keep(self, replies: Iterable[tuple[str, str, Any]]) -> None:
        """Keep replies, each as (prompt, digest, JSON-like reply)."""
        if self.journal:
            self.journal.append([(("call", self.name, prompt, digest), reply) for prompt, digest, reply in replies])

    def fail(self, prompt: str, digest: str, reason: str, tries: int) -> None:
        """Keep a failure: why, and how often it was asked in all."""
        if self.journal:
            before = self._failure(prompt, digest) or {"tries": 0}
            told = {"reason": reason, "tries": before["tries"] + tries}
            self.journal.append([(("failed", self.name, prompt, digest), told)], replace=True)

    def _failure(self, prompt: str, digest: str) -> dict[str, Any] | None:
        return self.journal.done.get(("failed", self.name, prompt, digest)) if self.journal else None


@runtime_checkable
class Remembering(Protocol):
    """What makes calls that are worth keeping one by one."""

    def remember(self, calls: Calls) -> None:
        """Look into ``calls`` before each call, and put it there when its reply comes."""
        ...


def content_digest(content: Any) -> str:
    """Sixteen hex digits of the SHA-256 of something JSON-like."""
    # 64 bits: two of a million items share a digest with a chance of 3 in 10^8.
    return hashlib.sha256(dumps(content).encode("utf-8")).hexdigest()[:16]


def peek(path: Path) -> dict[Key, Any]:
    """Header and items of a journal that another process may be writing, as far as they are whole.

    Raises:
        InputError: a line before the last is damaged.
    """
    return dict(item for _, line in whole_lines(path) if (item := unpack(line)))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON-like values differ, each as ``path: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            d for key in keys for d in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"{path}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
