"""Weight deltas: what turns a base into a target, so that a fine-tuned model can be published without its base.

A delta is a folder: ``delta.json`` (checksums of everything), one ``delta-*.safetensors`` for each weight file of the
target, and the target's other files (configuration, tokenizer) as they are. A tensor is stored as the XOR of its bits
with the base's, so it comes back bit for bit in any type; a difference of numbers does not, for base + (target - base)
rounds. Bytes are grouped by significance and deflated: between close models the upper ones are nearly all zero.
Everything is read, packed and written in blocks, so memory stays small whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import weights
from rankalign.models.delta import arithmetic
from rankalign.models.merge import merge_lora
from rankalign.models.weights import Bits
from rankalign.progress import Progress
from rankalign.storage.files import sha256_file, write_text
from rankalign.storage.folders import new_folder

MANIFEST = "delta.json"
FORMAT = "rankalign delta 1"
BLOCK = 1 << 24  # bytes packed at a time; a part of the format
Tensors = Mapping[str, Bits]
Bytes = NDArray[np.uint8]


def make(base: str, target: str, delta: str, *, merge_adapter: bool = False) -> dict[str, Any]:
    """Write the delta from ``base`` to ``target``.

    A tensor that the base lacks, or has in another type or row shape, is stored whole (and said to be); rows beyond the
    base's, those of added tokens, are stored as they are.

    Args:
        base: the model to start from: a name, folder or hub id.
        target: the model to be recovered, in safetensors; a LoRA adapter's folder is kept as an adapter.
        delta: folder to make; an existing one is never overwritten.
        merge_adapter: fold a LoRA adapter into its base first, so that a plain model is recovered.

    Returns:
        ``tensors`` (how many), ``bytes`` (size of the delta), ``sha256`` (of the target's weights, as
        :func:`rankalign.models.load.weights_fingerprint` gives it), ``bit_exact``; also ``whole`` (tensors stored
        whole), ``left_out`` (what of the target's folder is not carried), ``base_sha256`` and ``delta_sha256``.
    """
    if merge_adapter:
        beside = Path(delta).absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside) as temporary:
            merge_lora(target, f"{temporary}/merged")
            return make(base, f"{temporary}/merged", delta)
    goal = models.local_folder(target)
    if (goal / MANIFEST).exists():
        raise InputError(f"{target}: is a delta itself; apply it first")
    files = weights.weight_files(goal)
    with new_folder(delta) as fresh:
        have = _base_tensors(base)
        packer = _Packer(have)
        manifest: dict[str, Any] = {"format": FORMAT, "base": _lines("hashing the base", have), "shards": []}
        with Progress("packing", len(weights.folder_tensors(goal)), "tensor") as packer.bar:
            for number, file in enumerate(files, start=1):
                name = f"delta-{number:05d}-of-{len(files):05d}.safetensors"
                manifest["shards"].append(packer.shard(file, fresh / name))
        manifest |= {"target": packer.lines, "whole": packer.whole}
        manifest["files"], manifest["left_out"] = weights.copy_other_files(goal, fresh)
        manifest["sha256"] = _self_hash(manifest)
        write_text(fresh / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if packer.whole:
        print(f"{len(packer.whole)} tensors have no like in the base and are stored whole", file=sys.stderr)
    return _result(manifest, Path(delta))


def apply(base: str, delta: str, target: str, *, new_rows: str = "zero") -> dict[str, Any]:
    """Recover ``target`` from ``base`` and ``delta``; every file comes back as it was, bit for bit.

    A folder without ``delta.json`` is taken for an old arithmetic delta, see
    :func:`rankalign.models.delta.arithmetic.apply`.

    Args:
        base: the very model that the delta was made with; any other is refused, naming the first tensor that differs.
        delta: the delta's folder or hub id.
        target: folder to make; an existing one is never overwritten.
        new_rows: arithmetic deltas only: what the base is taken to hold for added tokens, ``zero`` or ``mean``.

    Returns:
        As for :func:`make`, with ``bytes`` the size of the target.
    """
    folder = models.local_folder(delta)
    if not (folder / MANIFEST).exists():
        return arithmetic.apply(models.local_folder(base), folder, Path(target), new_rows)
    manifest = _read_manifest(folder)
    with new_folder(target) as fresh, _well_formed(folder):
        have = _checked_base(base, manifest)
        with Progress("recovering", len(manifest["target"]), "tensor") as bar:
            for shard in manifest["shards"]:
                with open(fresh / shard["file"], "wb") as out:
                    out.writelines(_recover(folder, shard, manifest, have, bar))
        for name in manifest["files"]:
            shutil.copyfile(folder / name, fresh / name)
    return _result(manifest, Path(target))


def verify(delta: str, base: str = "", target: str = "") -> dict[str, Any]:
    """Check a delta: all its checksums; with ``base``, that it recovers the target; with ``target``, that this is it.

    Nothing is written.

    Raises:
        InputError: naming the first file or tensor that is not what it was.
    """
    folder = models.local_folder(delta)
    if not (folder / MANIFEST).exists():
        raise InputError(f"{delta}: has no {MANIFEST}, so there are no checksums to verify (an arithmetic delta?)")
    manifest = _read_manifest(folder)
    if base:
        have = _checked_base(base, manifest)
        with Progress("recovering", len(manifest["target"]), "tensor") as bar, _well_formed(folder):
            for shard in manifest["shards"]:
                for _ in _recover(folder, shard, manifest, have, bar):
                    pass
    if target:
        goal = models.local_folder(target)
        found = _lines("hashing the target", weights.folder_tensors(goal))
        _same(manifest["target"], found, f"target {target}", "that the delta recovers")
        for name, digest in manifest["files"].items():
            _check_file(goal / name, digest, target)
    return _result(manifest, folder)


# --- packing -----------------------------------------------------------------------------------------------------


class _Packer:
    """Packs the target's tensors and keeps what is learnt on the way.

    Attributes:
        lines: checksum line by tensor of the target.
        whole: tensors that have no like in the base.
    """

    bar: Progress

    def __init__(self, base: Tensors) -> None:
        self.base = base
        self.lines: dict[str, str] = {}
        self.whole: list[str] = []

    def shard(self, source: Path, path: Path) -> dict[str, Any]:
        """Pack one weight file into ``path``; returns its entry in the manifest.

        The packed sizes are known only at the end, so the header's room is kept free at first: padding is allowed.
        """
        header, wanted = weights.read_header(source)
        room = len(weights.header(dict.fromkeys(wanted, ("U8", (10**15,), 10**15))))  # digits enough for any size
        sizes: dict[str, int] = {}
        with open(path, "wb") as out:
            out.write(bytes(room))
            for name, bits in wanted.items():
                before = out.tell()
                out.writelines(self._pack(name, bits))
                sizes[name] = out.tell() - before
            out.seek(0)
            out.write(weights.header({name: ("U8", (size,), size) for name, size in sizes.items()}, room))
        size = source.stat().st_size
        return {"file": source.name, "bytes": size, "header": header, "delta": path.name, "sha256": sha256_file(path)}

    def _pack(self, name: str, wanted: Bits) -> Iterator[bytes]:
        base, digest = self.base.get(name), hashlib.sha256()
        if base is None or not _alike(base, wanted):
            base = None
            self.whole.append(name)
        for offset in range(0, wanted.size, BLOCK):
            block = wanted.read(offset, BLOCK)
            digest.update(block)
            packed = _deflate(_xor(block, base, offset), _element(wanted))
            yield struct.pack("<I", len(packed)) + packed
        self.lines[name] = weights.line(wanted, digest.hexdigest())
        self.bar.add()


def _recover(
    folder: Path, shard: dict[str, Any], manifest: dict[str, Any], have: Tensors, bar: Progress
) -> Iterator[bytes]:
    """The bytes of one weight file of the target, each tensor checked when it is through."""
    header = shard["header"].encode()
    yield struct.pack("<Q", len(header)) + header
    packed = weights.read_header(folder / shard["delta"])[1]
    for name, wanted in weights.parse_header(Path(shard["file"]), shard["header"], shard["bytes"]).items():
        base = None if name in manifest["whole"] else have[name]
        digest, position = hashlib.sha256(), 0
        for offset in range(0, wanted.size, BLOCK):
            (length,) = struct.unpack("<I", packed[name].read(position, 4))
            block = _inflate(
                packed[name].read(position + 4, length), min(BLOCK, wanted.size - offset), _element(wanted)
            )
            position += 4 + length
            out = _xor(block, base, offset).tobytes()
            digest.update(out)
            yield out
        if weights.line(wanted, digest.hexdigest()) != manifest["target"][name]:
            raise InputError(f"delta {folder}: tensor {name} does not come out as it was; get the delta again")
        bar.add()


def _alike(base: Bits, target: Bits) -> bool:
    """Whether a row lies at the same bytes in both; the number of rows may differ."""
    return base.dtype == target.dtype and base.shape[1:] == target.shape[1:] and len(base.shape) == len(target.shape)


def _element(bits: Bits) -> int:
    """Bytes of one element; 1 for types narrower than a byte."""
    return max(1, bits.size // math.prod(bits.shape))


def _xor(block: bytes, base: Bits | None, offset: int) -> Bytes:
    """The bits in which ``block`` differs from the base's bytes there; beyond the base's end, the block itself."""
    out = np.frombuffer(block, np.uint8).copy()
    if base is not None:
        under = np.frombuffer(base.read(offset, len(block)), np.uint8)
        out[: len(under)] ^= under
    return out


def _deflate(block: Bytes, element: int) -> bytes:
    """All first bytes, then all second bytes, ...; in such planes run lengths and Huffman codes find what there is."""
    planes = np.ascontiguousarray(block.reshape(-1, element).T)
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return deflate.compress(planes.data) + deflate.flush()


def _inflate(packed: bytes, size: int, element: int) -> bytes:
    planes = zlib.decompressobj().decompress(packed, size)  # a delta made up must not unpack to more than a block
    return np.frombuffer(planes, np.uint8).reshape(element, -1).T.tobytes()


# --- checking ----------------------------------------------------------------------------------------------------


def _base_tensors(base: str) -> Tensors:
    shards = weights.any_tensors(models.local_folder(base)).values()
    return {name: bits for shard in shards for name, bits in shard.items()}


def _checked_base(base: str, manifest: dict[str, Any]) -> Tensors:
    have = _base_tensors(base)
    _same(manifest["base"], _lines("hashing the base", have), f"base {base}", "that the delta was made with")
    return have


def _lines(what: str, tensors: Tensors) -> dict[str, str]:
    found = {}
    with Progress(what, len(tensors), "tensor") as bar:
        for name, bits in tensors.items():
            found[name] = weights.line(bits)
            bar.add()
    return found


def _same(wanted: Mapping[str, str], found: Mapping[str, str], where: str, which: str) -> None:
    for name in [*wanted, *found]:
        if name not in found:
            raise InputError(f"{where}: is not the model {which}: tensor {name} is missing")
        if name not in wanted:
            raise InputError(f"{where}: is not the model {which}: tensor {name} is too many")
        if wanted[name] != found[name]:
            kinds = [text.rpartition(" ")[0] for text in (found[name], wanted[name])]
            how = f"is {kinds[0]}, not {kinds[1]}" if kinds[0] != kinds[1] else "has other values"
            raise InputError(f"{where}: is not the model {which}: tensor {name} {how}")


def _self_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once it and every file it names are known to be as they were made."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest["sha256"] == _self_hash(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not whole:
        raise InputError(f"{path}: was changed after it was made; get the delta again")
    if manifest["format"] != FORMAT:
        raise InputError(f"{path}: is in the format {manifest['format']!r}; this version reads {FORMAT!r}")
    for shard in manifest["shards"]:
        _check_name(shard["file"], path)
        _check_file(folder / _check_name(shard["delta"], path), shard["sha256"], f"delta {folder}")
    for name, digest in manifest["files"].items():
        _check_file(folder / _check_name(name, path), digest, f"delta {folder}")
    return manifest


@contextlib.contextmanager
def _well_formed(folder: Path) -> Iterator[None]:
    """Checksums hold against accidents; who makes a delta up can make them up as well, and gets one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"delta {folder}: does not fit together: {error!r}") from error


def _check_name(name: str, where: Path) -> str:
    """A delta comes from strangers: it may name files in its own folder, and no pickles."""
    if Path(name).name != name or name in ("", ".", "..") or name.endswith(weights.PICKLES):
        raise InputError(f"{where}: names the file {name!r}, which no delta of this tool does: refused")
    return name


def _check_file(path: Path, digest: str, where: str) -> None:
    if not path.is_file():
        raise InputError(f"{where}: the file {path.name} is missing")
    if sha256_file(path) != digest:
        raise InputError(f"{where}: the file {path.name} is not as it was made (its sha256 differs)")


def _result(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "tensors": len(manifest["target"]),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "sha256": weights.fingerprint(manifest["target"]),
        "bit_exact": True,
        "whole": manifest["whole"],
        "left_out": manifest["left_out"],
        "base_sha256": weights.fingerprint(manifest["base"]),
        "delta_sha256": manifest["sha256"],
    }
