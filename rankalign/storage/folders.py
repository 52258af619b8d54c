"""Folders that appear whole or not at all: new ones, and cached ones that are built once and checked ever after."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rankalign.errors import InputError
from rankalign.storage.files import sha256_file, sync_directory, write_text

CHECKSUMS = "checksums.json"


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, synced and renamed; else it is removed.

    Raises:
        InputError: ``target`` is there already; nothing is ever overwritten.
    """
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: is there already and is not overwritten; name another folder or move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_strays(target.parent, target.name)
    fresh, lock = _held_folder(target)
    try:
        yield fresh
        for path in (path for path in fresh.rglob("*") if path.is_file()):
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        fresh.chmod(0o777 & ~_umask())
        readable(fresh)
        fresh.rename(target)
        sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _held_folder(target: Path) -> tuple[Path, int]:
    """A new folder beside ``target``, and the lock on it, which dies with this process: by it strays are known."""
    while True:
        # Beside the target: a rename from another file system would be a copy, which can be cut short.
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        try:
            lock = os.open(fresh, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a stray before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if fresh.exists():  # else it went while we waited for the lock of whoever removed it
            return fresh, lock
        os.close(lock)


def remove_strays(parent: Path, name: str) -> None:
    """Remove what killed processes left half-made for ``parent/name`` (a glob pattern); what is being made stays."""
    for stray in parent.glob(f".{name}.part-*"):
        try:
            handle = os.open(stray, os.O_RDONLY)
        except FileNotFoundError:  # another process was quicker
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its maker holds this lock as long as it lives
            shutil.rmtree(stray, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def readable(folder: Path) -> None:
    """Give saved weights the rights of other new files: safetensors writes them under a private name first."""
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(PermissionError):  # not ours, and so not written now
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """What new files are denied; mkdtemp makes a folder private, a model is not."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def check_writable(folder: Path) -> None:
    """Make a folder that a stage is going to write, and try whether it can, before hours are spent.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None


def cached_folder(folder: Path, build: Callable[[Path], None], held: Callable[[], None] = lambda: None) -> Path:
    """``folder`` with what ``build(empty folder)`` puts there, built once by however many processes ask at a time.

    ``checksums.json`` lies in it; a folder whose files do not match is built again, and that is said on stderr.

    Args:
        folder: where it is, or is to be.
        build: fills an empty folder.
        held: called once this process holds the lock, behind which all others wait.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock's file is never removed: who waits on a removed one and who makes it anew would both go in.
    with _locked(folder.with_name(folder.name + ".lock")):
        held()
        if folder.exists():
            if _intact(folder):
                return folder
            print(f"{folder} is damaged: building it again", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
        with new_folder(folder) as fresh:
            build(fresh)
            sums = {path.name: sha256_file(path) for path in sorted(fresh.iterdir())}
            write_text(fresh / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock dies with its holder."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        return all(sha256_file(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
