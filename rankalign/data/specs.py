"""``--data "prefs:train#500,org/name*2"``: data sets with split, number and weight, as one path for every reader."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankalign.data.convert import convert
from rankalign.data.mixing import Mixture
from rankalign.errors import InputError
from rankalign.storage.code import hash_of, is_code
from rankalign.storage.files import is_remote
from rankalign.storage.jsonl import dumps
from rankalign.storage.sources import ENDINGS, LISTING, is_there, parts, sha256_of, shards

_PART = re.compile(r"(?P<path>.+?)(:(?P<split>[A-Za-z]\w*))?(#(?P<count>\d+))?(\*(?P<weight>\d+(\.\d+)?))?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# `train_prefs-00000-of-00002.parquet` is of the split train_prefs.
_SHARD = re.compile(r"(-\d+-of-\d+)?(\.\w+)+$")
ALL = 2**31  # more records than any set has


@dataclass(frozen=True)
class Part:
    """One data set of a specification.

    Attributes:
        path: a file, folder, pattern, address or hub id.
        split: of a folder or hub id; empty takes all there is, of a hub id ``train``.
        count: how many records at the most; 0 takes all.
        weight: share of the mixture; 0 where none was given.
    """

    path: str
    split: str = ""
    count: int = 0
    weight: float = 0.0


def parse(text: str) -> list[Part]:
    """The data sets of a specification; a text that is a path as it stands is one.

    Raises:
        InputError: a part without a path, or a number that takes nothing.
    """
    if is_there(text):
        return [Part(text)]
    found = []
    for word in text.split(","):
        told = _PART.fullmatch(word.strip())
        if told is None:
            raise InputError(f"--data {text!r}: a data set is missing between two commas")
        if is_there(word.strip()):  # a name may hold a mark
            found.append(Part(word.strip()))
            continue
        count, weight = told["count"], told["weight"]
        if (count and not int(count)) or (weight and not float(weight)):
            raise InputError(f"--data {word.strip()}: takes no record of it; leave it out")
        found.append(Part(told["path"], told["split"] or "", int(count or 0), float(weight or 0)))
    return found


def located(text: str, cache: Path, as_records: bool = False, **reading: Any) -> str:
    """A path for a specification. Several data sets, and a part of one, are mixed by ``convert`` into the cache, once.

    Which records a number or a weight takes is decided by :class:`rankalign.data.mixing.Mixture`, so it is the same
    everywhere, and a larger number holds a smaller one.

    Args:
        text: data sets with commas between them, each ``PATH[:SPLIT][#COUNT][*WEIGHT]``.
        cache: where mixtures are kept.
        as_records: also a data set that is taken whole becomes a file of our records there.
        reading: ``from_format``, ``skip_invalid`` and ``ignore_columns`` of :func:`rankalign.data.convert.convert`.

    Raises:
        InputError: a data set is neither here nor to be had, or has no such split.
    """
    told = parse(text)
    paths = [_split(part) for part in told]
    if len(told) == 1 and not told[0].count and not (as_records and not is_mixture(paths[0], cache)):
        return paths[0]  # a weight of the only one is all of it
    weighted = any(part.weight for part in told)
    mixture = Mixture(
        weights=tuple(part.weight or 1.0 for part in told) if weighted else (),
        limits=tuple(part.count or ALL for part in told) if any(part.count for part in told) else (),
    )
    return str(_mixed(paths, mixture, cache, reading))


def is_mixture(path: str, cache: Path) -> bool:
    """Whether the file was made by :func:`located` or :func:`held_out`: it holds our records, whatever it came from."""
    return Path(path).parent == cache / "mixed"


def _split(part: Part) -> str:
    here = is_there(part.path)
    path = part.path if here else _fetched(part.path)
    if not part.split:
        several = parts(path)
        if here or len(several) < 2:
            return path
        part = Part(path, "train")  # what those take who name no split of a hub id
    if is_remote(path):
        raise InputError(
            f"{part.path}:{part.split}: a split behind an address is named by its files: {path}/train*.parquet"
        )
    if (Path(path) / LISTING).is_file():
        names = [Path(folder).name for folder in parts(path)]
        if part.split in names:
            return str(Path(path) / part.split)
    else:
        by_name: dict[str, list[Path]] = {}
        for shard in shards(path):
            inner = shard.relative_to(path)
            for name in {_SHARD.sub("", inner.name), *inner.parts[:-1]}:
                by_name.setdefault(name, []).append(shard)
        if files := by_name.get(part.split):
            return _one_path(files, part.split)
        names = sorted(by_name)
    raise InputError(f"{part.path}: has no split {part.split!r}; it has {', '.join(names) or 'none'}")


def _one_path(files: list[Path], split: str) -> str:
    """A path that names just these files."""
    if len(files) == 1:
        return str(files[0])
    folders = {file.parent for file in files}
    if len(folders) == 1:
        (folder,) = folders
        if set(shards(folder)) == set(files):
            return str(folder)
        return str(folder / f"{split}-*-of-*{''.join(files[0].suffixes)}")
    return str(next(parent for parent in files[0].parents if parent.name == split))


def _fetched(name: str) -> str:
    """The folder of a data set of the hub, its data files alone; what was fetched before is not fetched again."""
    # A misspelt file must not become a request to another host.
    if not _HUB_ID.fullmatch(name) or name.endswith(ENDINGS) or Path(name).parent.is_dir():
        raise InputError(f"{name}: no such file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"*{ending}{packed}" for ending in ENDINGS for packed in ("", ".gz")]
    try:
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no such file here, and the hub does not give it: {why}") from None


def held_out(path: str, share: float, cache: Path, **reading: Any) -> tuple[str, str]:
    """A file of records to train on and one to measure on, which holds ``share`` of the records of ``path``.

    Raises:
        InputError: a share that makes no sense, or one of so few records that nothing is held out.
    """
    mixture = Mixture(test_size=share)
    target = _mixed([path], mixture, cache, reading)
    test = target.with_name(f"{target.stem}.test.jsonl")
    if not test.stat().st_size:
        raise InputError(f"--eval_split {share:g} of {path}: nothing is held out; name a larger share or --eval_data")
    return str(target), str(test)


def _mixed(paths: list[str], mixture: Mixture, cache: Path, reading: dict[str, Any]) -> Path:
    """The file of a mixture, made once for the same bytes and numbers."""
    key: list[Any] = [sorted(vars(mixture).items()), sorted(reading.items()), [sha256_of(path) for path in paths]]
    if is_code(name := str(reading.get("from_format", ""))):
        key.append(hash_of(name))
    target = cache / "mixed" / f"{hashlib.sha256(dumps(key).encode()).hexdigest()[:32]}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        done = convert(paths, target, mixture=mixture, **reading)
        lost = "".join(f", {count} {why}" for why, count in done["lost"].items())
        print(f"data: {done['written']} records of {len(paths)} files{lost}", file=sys.stderr)
    return target
