"""Files that are never half-written, and text lines read the way JSON Lines means them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rankalign.errors import InputError, RecordError

GZIP_MAGIC = b"\x1f\x8b"


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write ``path`` through ``path.part``, synced and renamed into place; on any error the old file stays.

    A ``.gz`` name is compressed, without a time stamp, so equal content gives equal bytes.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with open(part, "wb") as raw:
            if target.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_writer(path) as out:
        out.write(text.encode("utf-8"))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole content of a file, gunzipped when it starts with gzip's magic, whatever its name.

    Raises:
        InputError: the file is missing, a folder, unreadable or a damaged gzip.
    """
    try:
        raw = Path(path).read_bytes()
        return gzip.decompress(raw) if raw.startswith(GZIP_MAGIC) else raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    r"""Yield ``(line number, bytes)``, 1-based, split on ``\n`` alone; a byte-order mark and final ``\r`` are dropped.

    U+2028, U+0085 and friends may stand inside JSON strings, so ``str.splitlines`` would cut records in two.
    Bytes, because one line that is not UTF-8 must not hide the others: see :func:`decode`.
    """
    for number, raw in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        yield number, raw.removesuffix(b"\r")


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
