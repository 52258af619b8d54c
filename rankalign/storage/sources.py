"""One way to open data: a file of lines, a JSON list, a table, a folder of `datasets`, a folder or pattern of shards.

Every command and Python call that takes a path of records goes through :func:`rows_of`, so that what one of them
reads all of them read; stored reviews, annotations and categories are JSON Lines alone. :func:`parts` says which
splits a path holds: a test split is not to be trained on by accident.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rankalign.errors import InputError, Line
from rankalign.storage.files import is_remote, remote, sha256_file
from rankalign.storage.jsonl import OnError, Quick, Row, give_up, read_rows
from rankalign.storage.spreadsheet import is_spreadsheet, read_sheet
from rankalign.storage.tables import read_table
from rankalign.storage.wrapped import unwrapped

Source = str | os.PathLike[str]

ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet")
LISTING, STATE = "dataset_dict.json", "state.json"
# Files with such an ending that a folder of data holds beside the data.
_BESIDE = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|manifest\.json|config\.json|metadata\.json")
# `train-00000-of-00002.parquet`, `test.jsonl`, `validation_1.json.gz`; a folder named so is a split, too.
_SPLIT = re.compile(r"(?:.*[._-])?(train|test|validation|valid|val|dev|eval)(?:[._-].*)?", re.IGNORECASE)


def parts(path: Source) -> list[str]:
    """The splits of a saved ``DatasetDict`` or of a folder of shards, each as a path; any other path as it is.

    A split whose shards lie among those of others is the pattern of its files.

    Raises:
        InputError: the folder's list of splits is damaged.
    """
    if not is_remote(path) and (Path(path) / LISTING).is_file():
        return [str(Path(path) / name) for name in _listed(Path(path) / LISTING)]
    if not os.path.isdir(path) or _is_saved(path):
        return [str(path)]
    splits: dict[str, list[Path]] = {}
    for shard in shards(path):
        splits.setdefault(_split_of(shard, Path(path)), []).append(shard)
    if len(splits) < 2 or "" in splits:  # where one shard belongs to no split, the names say nothing of splits
        return [str(path)]
    return [_pattern(files) for files in splits.values()]


def _listed(listing: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(listing.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{listing}: does not list the splits: {error}") from None


def _is_saved(path: Source) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (Path(path) / STATE).is_file() or (Path(path) / LISTING).is_file()


def _split_of(shard: Path, folder: Path) -> str:
    inner = shard.relative_to(folder)
    for name in (*inner.parts[:-1], inner.name.split(".")[0]):
        if found := _SPLIT.fullmatch(name):
            return found[1].lower()
    return ""


def _pattern(files: list[Path]) -> str:
    """A path or pattern that names just these files: their folder where it is theirs alone."""
    if len(files) == 1:
        return str(files[0])
    folder, first = files[0].parent, _SPLIT.fullmatch(files[0].name.split(".")[0])
    alone = set(shards(folder)) == set(files)
    return str(folder) if alone or first is None else str(folder / f"*{first[1]}*{files[0].suffix}")


def shards(path: Source) -> list[Path]:
    """The files of a folder or of a pattern with ``*``, in the order of their names; none for a single file."""
    if os.path.isdir(path):
        found = sorted(inner for inner in Path(path).rglob("*") if inner.is_file())  # file systems list in any order
        # Caches of other tools, and our own folders that are still being made, begin with a dot.
        hidden = [any(name.startswith(".") for name in inner.relative_to(path).parts) for inner in found]
        return [inner for inner, skip in zip(found, hidden, strict=True) if not skip and _is_shard(inner)]
    if glob.has_magic(str(path)) and not os.path.exists(path):  # a file may be called `a[1].jsonl`
        return [inner for inner in map(Path, sorted(glob.glob(str(path), recursive=True))) if inner.is_file()]
    return []


def _is_shard(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(ENDINGS) and not _BESIDE.fullmatch(path.name)


def rows_of(path: Source, on_error: OnError | None = None, quick: Quick | None = None) -> Iterator[Row]:
    """Rows of whatever ``path`` names, each with its line, its element of a list or its row of a table.

    Rows of several shards are counted through; what is wrong with one names the shard and the place in it. Lines of
    files of lines are offered to ``quick`` first, see :data:`rankalign.storage.jsonl.Quick`.

    Raises:
        RecordError: a row is none, and there is no ``on_error``.
        InputError: nothing is there, or it is no data.
    """
    if is_remote(path):
        yield from _remote_rows(str(path), on_error, quick)
        return
    files = [] if _is_saved(path) else shards(path)
    if os.path.isdir(path) and not files and not _is_saved(path):
        raise InputError(f"{path}: a folder without data: no file in it ends in {', '.join(ENDINGS)}")
    if glob.has_magic(str(path)) and not files and not os.path.exists(path):
        raise InputError(f"{path}: no file has such a name")
    if not files:
        yield from _rows_of_one(path, on_error, quick)
        return
    yield from _counted_through(map(str, files), on_error, quick)


def _counted_through(files: Iterable[str], on_error: OnError | None, quick: Quick | None) -> Iterator[Row]:
    count = 0
    for file in files:
        for line, row in _rows_of_one(file, on_error, quick):
            count += 1
            yield Line.of(line, getattr(line, "element", 0), file=file, row=count), row


def _remote_rows(path: str, on_error: OnError | None, quick: Quick | None) -> Iterator[Row]:
    """Rows of a file, a folder or a pattern behind an address."""
    system, inner = remote(path)
    found = system.glob(inner) if glob.has_magic(inner) else []
    if system.isdir(inner):
        found = [name for name in system.find(inner) if _is_shard(Path(name)) and "/." not in name]
    if glob.has_magic(inner) and not found:
        raise InputError(f"{path}: no file has such a name")
    if system.isdir(inner) and not found:
        raise InputError(f"{path}: a folder without data: no file in it ends in {', '.join(ENDINGS)}")
    if not found:
        yield from _rows_of_one(path, on_error, quick)
    else:
        yield from _counted_through(map(system.unstrip_protocol, sorted(found)), on_error, quick)


def _rows_of_one(path: Source, on_error: OnError | None, quick: Quick | None) -> Iterator[Row]:
    if is_spreadsheet(path):
        return read_sheet(path, on_error or give_up)
    if str(path).endswith(".parquet") or os.path.isdir(path):
        return read_table(path, on_error)
    inner = unwrapped(path, on_error) if os.path.isfile(path) else None
    return read_rows(path, on_error, quick) if inner is None else inner


def is_there(path: Source) -> bool:
    """Whether a path or a pattern names anything."""
    if is_remote(path):
        system, inner = remote(path)
        return bool(system.exists(inner) or system.glob(inner))
    return os.path.exists(path) or bool(shards(path))


def sha256_of(path: Source) -> str:
    """Hex SHA-256 of what ``path`` names: a file, a folder, or the files of a pattern in the order of their names.

    Raises:
        InputError: nothing is there.
    """
    if is_remote(path):
        raise InputError(f"{path}: what is to be resumed is read from this machine: `convert` it to a file first")
    files = shards(path)
    if not os.path.exists(path) and not files:
        raise InputError(f"{path}: no such file")
    if os.path.exists(path):
        return sha256_file(path)
    return hashlib.sha256("".join(f"{sha256_file(file)}  {file.name}\n" for file in files).encode()).hexdigest()
