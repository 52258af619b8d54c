"""Weights as raw bits: tensors in files and in memory, read in blocks and fingerprinted alike."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.storage.files import sha256_file

BLOCK = 1 << 24  # bytes read at a time: a multiple of every element size, small beside any memory
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # they can run code when they are read

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Bits(Protocol):
    """One tensor as bytes."""

    @property
    def dtype(self) -> str:
        """Element type under its safetensors name, such as ``BF16``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` in row-major order; fewer at the end."""
        ...


@dataclass(frozen=True)
class FileBits:
    """A tensor that lies in a file at ``begin``; see :class:`Bits`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``; fewer at the end."""
        with open(self.file, "rb") as source:
            source.seek(self.begin + offset)
            return source.read(max(0, min(count, self.size - offset)))


class TensorBits:
    """A tensor in memory (or mapped there from a file); see :class:`Bits`."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape = DTYPES[tensor.dtype], tuple(tensor.shape)
        self._flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.size = len(self._flat)

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset``; fewer at the end."""
        return bytes(self._flat[offset : offset + count].numpy().data)


def blocks(bits: Bits) -> Iterator[bytes]:
    """All bytes of a tensor, ``BLOCK`` at a time."""
    return (bits.read(offset, BLOCK) for offset in range(0, bits.size, BLOCK))


def line(bits: Bits, digest: str = "") -> str:
    """Type, shape and SHA-256 of one tensor's bits, as text; ``digest`` saves the reading where it is known."""
    if not digest:
        running = hashlib.sha256()
        for block in blocks(bits):
            running.update(block)
        digest = running.hexdigest()
    return f"{bits.dtype} {list(bits.shape)} {digest}"


def fingerprint(lines: Mapping[str, str]) -> str:
    """One SHA-256 over the names and :func:`line` texts of all tensors, in whatever order or files they lie."""
    text = "".join(f"{name} {lines[name]}\n" for name in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


# --- safetensors -------------------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[str, dict[str, FileBits]]:
    """The header of a safetensors file: its JSON text as it stands, and the tensors in the order of their bytes.

    Raises:
        InputError: the file is missing, cut short, or no safetensors file.
    """
    try:
        with open(path, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            total = os.fstat(source.fileno()).st_size
            if length > total - 8:
                raise ValueError("it is cut short")
            text = source.read(length).decode("utf-8")
        return text, parse_header(path, text, total)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: is no whole safetensors file: {error}") from None


def parse_header(path: Path, text: str, total: int) -> dict[str, FileBits]:
    """The tensors that header ``text`` describes, which must fill a file of ``total`` bytes without gap or overlap."""
    entries: dict[str, Any] = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    position = 8 + len(text.encode())
    found = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        bits = FileBits(path, entry["dtype"], shape, position, end - begin)
        if 8 + len(text.encode()) + begin != position or end < begin or (math.prod(shape) == 0) != (end == begin):
            raise ValueError(f"its header does not fit together at {name}")
        found[name] = bits
        position += bits.size
    if position != total:
        raise ValueError(f"it should have {position} bytes and has {total}")
    return found


def header(entries: Mapping[str, tuple[str, tuple[int, ...], int]], room: int = 0) -> bytes:
    """The head of a safetensors file whose tensors (type, shape, bytes) follow in this order, padded to ``room``."""
    told, position = {}, 0
    for name, (dtype, shape, size) in entries.items():
        told[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **told}, separators=(",", ":")).encode().ljust(room - 8)
    return struct.pack("<Q", len(text)) + text


def weight_files(folder: str | os.PathLike[str], pattern: str = "*.safetensors") -> list[Path]:
    """The weight files of a model folder, every shard that an index names among them.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    files = sorted(Path(folder).glob(pattern))
    for index in Path(folder).glob(f"{pattern}.index.json"):
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {file.name for file in files}
        if missing:
            raise InputError(f"{folder}: the shard {min(missing)} that {index.name} names is missing")
    if not files:
        raise InputError(f"{folder}: holds no weights ({pattern})")
    return files


def folder_tensors(folder: str | os.PathLike[str]) -> dict[str, FileBits]:
    """All tensors in the safetensors files of a folder, by name."""
    found: dict[str, FileBits] = {}
    for file in weight_files(folder):
        for name, bits in read_header(file)[1].items():
            if name in found:
                raise InputError(f"{folder}: tensor {name} is in both {found[name].file.name} and {file.name}")
            found[name] = bits
    return found


def pickled_tensors(folder: str | os.PathLike[str]) -> dict[str, dict[str, TensorBits]]:
    """Tensors of the ``pytorch_model*.bin`` files of a folder, by file; mapped from disk, and no code of theirs runs.

    Raises:
        InputError: there are none, or one holds something else than tensors.
    """
    found = {}
    for file in weight_files(folder, "pytorch_model*.bin"):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            found[file.name] = {name: TensorBits(tensor) for name, tensor in state.items()}
        except Exception as error:  # torch raises what it likes on a hostile or damaged file
            raise InputError(f"{file}: cannot be read as plain tensors: {str(error).splitlines()[0]}") from None
    return found


def any_tensors(folder: str | os.PathLike[str]) -> dict[str, dict[str, Bits]]:
    """All tensors of a folder by file and name, from safetensors or, failing those, old ``.bin`` files."""
    if any(Path(folder).glob("pytorch_model*.bin")) and not any(Path(folder).glob("*.safetensors")):
        return {name: dict(tensors) for name, tensors in pickled_tensors(folder).items()}
    return {file.name: dict(read_header(file)[1]) for file in weight_files(folder)}


def copy_other_files(source: Path, target: Path) -> tuple[dict[str, str], list[str]]:
    """Copy what lies beside the weights (configuration, tokenizer, card): checksums by name, and what was left out.

    Left out are folders, and pickles, which nobody should pass on.
    """
    copied, left_out = {}, []
    for path in sorted(source.iterdir()):
        if path.is_dir() or path.suffix in PICKLES:
            left_out.append(path.name)
        elif path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
            copied[path.name] = sha256_file(target / path.name)
    return copied, left_out


def module_tensors(module: nn.Module) -> dict[str, TensorBits]:
    """All tensors of a module's state by name; one that is there under two names (tied) counts under the first."""
    found, seen = {}, set()
    for name, tensor in module.state_dict().items():
        # One memory may be seen as several tensors that are not the same.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in seen:
            seen.add(place)
            found[name] = TensorBits(tensor)
    return found
