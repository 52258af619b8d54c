"""A file of votes that only grows: one record a line, each on disk before the page says so."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
from pathlib import Path

from rankalign.data.records import CandidateSet, read, to_dict
from rankalign.errors import InputError
from rankalign.storage.files import sync_directory, write_all
from rankalign.storage.jsonl import dumps, loads


class VoteFile:
    """Records, appended one by one; locked against other programs until closed.

    A vote is one ``write`` and one ``fsync``. What a kill or a full disk leaves behind it is at most one torn last
    line, which the next opening takes off, and says so.

    Args:
        path: the file; made if it is not there.

    Attributes:
        count: how many records it holds.
        highest: the highest number of an id such as ``chat-00007`` in it, or 0.

    Raises:
        InputError: it cannot be written, holds something else than records by the line, or another program has it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            self._lock()
            ids = self._load()
        except BaseException:
            self.close()
            raise
        self.count = len(ids)
        self.highest = max((int(found[1]) for name in ids if (found := re.fullmatch(r"chat-(\d+)", name))), default=0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another program is writing votes there; name another file") from None

    def _load(self) -> list[str]:
        content = self.path.read_bytes()
        if content[:1] in (b"\x1f", b"["):
            raise InputError(f"{self.path}: is compressed or one JSON list; votes need a file of one record a line")
        tail = content[content.rfind(b"\n") + 1 :]
        if tail and _whole(tail):  # an editor saved the file without its last line feed
            write_all(self._handle, b"\n")
        elif tail:
            os.ftruncate(self._handle, len(content) - len(tail))
            print(f"{self.path}: its last line was torn ({len(tail)} bytes) and is taken off", file=sys.stderr)
        sync_directory(self.path.resolve().parent)
        return [record.id for record in read(self.path)] if self.path.read_bytes().strip() else []

    def append(self, record: CandidateSet) -> None:
        """Add one record and sync it to disk.

        Raises:
            InputError: the write failed; the file is as it was before.
        """
        end = os.fstat(self._handle).st_size
        try:
            write_all(self._handle, dumps(to_dict(record)).encode() + b"\n")
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, end)
            what = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise InputError(f"{self.path}: the vote was not stored: {what}") from None
        self.count += 1

    def close(self) -> None:
        """Release the lock."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _whole(line: bytes) -> bool:
    """Whether a last line without its line feed is a JSON object all the same."""
    try:
        return isinstance(loads(line.decode()), dict)
    except ValueError:
        return False
