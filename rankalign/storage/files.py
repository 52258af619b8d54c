"""Files that are never half-written, and text lines read the way JSON Lines means them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from rankalign.errors import InputError, RecordError

GZIP_MAGIC = b"\x1f\x8b"
MARK = b"\xef\xbb\xbf"  # UTF-8's byte-order mark
BLOCK = 1 << 18  # bytes read at once; larger ones are no faster


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write ``path`` through ``path.part``, synced and renamed into place; on any error the old file stays.

    A ``.gz`` name is compressed, without a time stamp, so equal content gives equal bytes. What is no regular file (a
    pipe, ``/dev/stdout``) cannot be renamed onto and is written as it stands.

    Raises:
        InputError: the file cannot be written: no permission, no such place, a full disk.
    """
    if is_remote(path):
        with _uploaded(path) as out:
            yield out
        return
    target = Path(path)
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            with open(target, "wb") as stream:
                yield stream
        else:
            with _renamed_into_place(target) as out:
                yield out
    except OSError as error:
        if error.filename and Path(error.filename) not in (target, _part_of(target), *target.parents):
            raise  # it is about another file, which the block reads
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _uploaded(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Written here first: stores show an object when it is closed, be it whole or not."""
    system, inner = remote(path)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / Path(inner).name
        with _renamed_into_place(whole) as out:
            yield out
        try:
            system.put_file(str(whole), inner)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error}") from None


def _part_of(target: Path) -> Path:
    """Where a file is written until it is whole."""
    return target.with_name(target.name + ".part")


@contextlib.contextmanager
def _renamed_into_place(target: Path) -> Iterator[IO[bytes]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(target)
    try:
        with open(part, "wb") as raw:
            if target.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    yield packed  # type: ignore[misc]  # typeshed's GzipFile is no IO[bytes]
            else:
                yield raw
            # Synced before the rename: else a power cut could leave the final name with nothing behind it.
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(part, target)
    except BaseException:  # Ctrl-C, too, leaves no .part behind
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_directory(target.parent)


def sync_directory(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, block: bytes) -> None:
    """Write a whole block to an open file: the system may take less of it at a time."""
    while block:
        block = block[os.write(handle, block) :]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_writer(path) as out:
        out.write(text.encode("utf-8"))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes; of a folder that of its files' digests and names, in the order of the names."""
    digest = hashlib.sha256()
    if os.path.isdir(path):
        for inner in sorted(inner for inner in Path(path).rglob("*") if inner.is_file()):
            digest.update(f"{sha256_file(inner)}  {inner.relative_to(path).as_posix()}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address, ``s3://bucket/file``, that fsspec opens."""
    return "://" in str(path)


def remote(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        InputError: the package for such addresses is missing, or it cannot be reached.
    """
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError, OSError) as error:  # an unknown scheme is a ValueError
        raise InputError(f"{path}: cannot be opened: {error}") from None
    return system, inner


if TYPE_CHECKING:
    Stream: TypeAlias = io.BufferedReader[Any]  # not of one kind of raw stream only


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Stream]:
    """A file's content as a stream, gunzipped when it starts with gzip's magic, whatever its name.

    Raises:
        InputError: the file is missing, a folder, unreadable or a damaged gzip, be it found while the block reads.
    """
    try:
        with io.BufferedReader(open_raw(path), BLOCK) as raw:
            if raw.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC):
                with io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK) as unpacked:
                    yield unpacked
            else:
                yield raw
    except FileNotFoundError as error:
        if error.filename is not None and str(error.filename) != str(path):
            raise  # it is about another file, which the block reads
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.filename is not None and str(error.filename) != str(path):
            raise
        raise InputError(f"{path}: cannot be read: {error}") from None


def open_raw(path: str | os.PathLike[str]) -> Any:
    """A file or an address, open for reading bytes as they are."""
    if not is_remote(path):
        return io.FileIO(path)
    system, inner = remote(path)
    return system.open(inner, "rb")


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    r"""Yield ``(line number, bytes)``, 1-based, split on ``\n`` alone; a byte-order mark and final ``\r`` are dropped.

    U+2028, U+0085 and friends may stand inside JSON strings, so ``str.splitlines`` would cut records in two.
    Bytes, because one line that is not UTF-8 must not hide the others: see :func:`decode`.
    """
    with reading(path) as source:
        yield from split_lines(source)


def split_lines(source: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of an open file; see :func:`read_lines`. What follows the last line feed is a line, even if empty."""
    number, whole = 0, True
    for number, raw in enumerate(source, start=1):
        whole = raw.endswith(b"\n")
        bare = raw[:-1] if whole else raw
        yield number, (bare.removeprefix(MARK) if number == 1 else bare).removesuffix(b"\r")
    if whole:
        yield number + 1, b""


def decode(path: str | os.PathLike[str], line: int, raw: bytes) -> str:
    """One line as UTF-8.

    Raises:
        RecordError: naming file, line and byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(str(path), line, "", f"not UTF-8: {error.reason} at byte {error.start}") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole text file, line ends made ``\\n``."""
    return "\n".join(decode(path, number, raw) for number, raw in read_lines(path))


def cache_dir() -> Path:
    """Where is kept what was made here and can be made again: ``$RANKALIGN_CACHE``, or ``~/.cache/rankalign``."""
    return Path(os.environ.get("RANKALIGN_CACHE") or Path.home() / ".cache" / "rankalign")
