"""What a file's first bytes are, where they are not the text that was expected: one sentence with the way on."""

from __future__ import annotations

import re

# Beginnings of files that stand where rows were expected: https://www.garykessler.net/library/file_sigs.html has more.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    # Before UTF-16, whose mark it begins with.
    (b"\xff\xfe\x00\x00", "is UTF-32, not UTF-8: `iconv -f UTF-32 -t UTF-8` makes it readable"),
    (b"\x00\x00\xfe\xff", "is UTF-32, not UTF-8: `iconv -f UTF-32 -t UTF-8` makes it readable"),
    (b"\xff\xfe", "is UTF-16, not UTF-8: `iconv -f UTF-16 -t UTF-8` makes it readable"),
    (b"\xfe\xff", "is UTF-16, not UTF-8: `iconv -f UTF-16 -t UTF-8` makes it readable"),
    (b"version https://git-lfs.github.com/spec", "is a Git LFS pointer, not the data: `git lfs pull` fetches it"),
    (b"PK\x03\x04", "is a zip archive (or a spreadsheet, a PyTorch file): unpack or export it first"),
    (b"BZh", "is packed with bzip2: `bunzip2` it first"),
    (b"\xfd7zXZ\x00", "is packed with xz: `unxz` it first"),
    (b"\x28\xb5\x2f\xfd", "is packed with Zstandard: `unzstd` it first"),
    (b"PAR1", "is Parquet, whose name must end in .parquet"),
    (b"ARROW1", "is an Arrow file: write it as Parquet, or name the `datasets` folder that it lies in"),
    (b"\xff\xff\xff\xff", "is an Arrow stream: name the `datasets` folder that it lies in"),
    (b"Obj\x01", "is Avro: write it as JSON Lines or Parquet"),
    (b"\x89HDF", "is HDF5: write it as JSON Lines or Parquet"),
    (b"\x93NUMPY", "is a NumPy array: write it as JSON Lines or Parquet"),
    (b"SQLite format 3", "is an SQLite database: write it as JSON Lines or Parquet"),
    (b"%PDF", "is a PDF"),
)
_PICKLE = re.compile(rb"\A\x80[\x02-\x05]")  # protocols 2 to 5; no text in UTF-8 begins so
_MARKUP = re.compile(rb"\A\s*<(?:!doctype|html|\?xml)", re.IGNORECASE)
_LOOKED_AT = 4096


def trouble(raw: bytes) -> str:
    """What a file is instead of UTF-8 text, as the rest of a sentence that begins with its name, or nothing.

    Args:
        raw: how it begins; some kilobytes are enough.

    >>> trouble('{"id": 1}'.encode("utf-16"))
    'is UTF-16, not UTF-8: `iconv -f UTF-16 -t UTF-8` makes it readable'
    >>> trouble(b'{"id": 1}')
    ''
    """
    for magic, what in _MAGIC:
        if raw.startswith(magic):
            return what
    if _PICKLE.match(raw):
        return "is a Python pickle, which is not read because loading one runs whatever it says: write it as JSON Lines"
    if _MARKUP.match(raw):
        return "is a web page or XML, perhaps the answer of a server that asked to log in: fetch the file itself"
    if raw[257:262] == b"ustar":  # tar's magic stands behind the name, rights and sizes of its first file
        return "is a tar archive: unpack it first"
    return _zeros(raw[:_LOOKED_AT])


def _zeros(raw: bytes) -> str:
    """Text without a byte-order mark in two bytes a letter has a zero in every other place; text has none at all."""
    if raw.count(0) >= max(1, len(raw) // 3):  # a third and not a half: letters beyond Latin-1 have no zero byte
        order = "LE" if raw[1::2].count(0) >= raw[::2].count(0) else "BE"
        return f"looks like UTF-16, not UTF-8: `iconv -f UTF-16{order} -t UTF-8` makes it readable"
    return ""
