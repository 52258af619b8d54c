"""Arithmetic deltas, as Vicuna, Alpaca and Wombat were published: target = base + delta, number by number.

The sum is rounded in the delta's type, as the tools of the time did, so it is the target only nearly: between close
models about one weight in fifty differs in its last bit. Nothing tells a wrong base from the right one; that is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankalign.errors import InputError
from rankalign.models import weights
from rankalign.models.weights import Bits, TensorBits
from rankalign.progress import Progress
from rankalign.storage.folders import new_folder

TYPES = {name: dtype for dtype, name in weights.DTYPES.items()}
COMPUTED = "rotary_emb.inv_freq"  # old files hold these tables beside the weights; models compute them themselves
NEW_ROWS = ("zero", "mean")


def apply(base: Path, delta: Path, target: Path, new_rows: str = "zero") -> dict[str, Any]:
    """Add an arithmetic delta (safetensors, or ``.bin`` read without running code) to a base, a tensor at a time.

    Args:
        base: folder of the base; read in the delta's type.
        delta: folder of the delta, with the target's configuration and tokenizer.
        target: folder to make, in safetensors; an existing one is never overwritten.
        new_rows: what the base holds for tokens that it lacks: ``zero`` (Wombat's recipe) or the ``mean`` of its rows
            (Alpaca's).

    Returns:
        ``tensors``, ``bytes`` and ``sha256`` of the target, ``bit_exact`` (False), ``left_out``.
    """
    if new_rows not in NEW_ROWS:
        raise InputError(f"unknown new_rows {new_rows!r} (one of: {', '.join(NEW_ROWS)})")
    print(
        "no delta.json: adding an arithmetic delta, whose base cannot be checked and whose sum is rounded",
        file=sys.stderr,
    )
    have = {name: bits for shard in weights.any_tensors(base).values() for name, bits in shard.items()}
    shards = list(weights.any_tensors(delta).values())
    dropped = _match(have, {name: bits for shard in shards for name, bits in shard.items()}, base)
    lines: dict[str, str] = {}
    with new_folder(target) as fresh, Progress("adding", sum(map(len, shards)), "tensor") as bar:
        names = _file_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            kept = {key: bits for key, bits in shard.items() if key not in dropped}
            with open(fresh / name, "wb") as out:
                out.write(weights.header({key: (bits.dtype, bits.shape, bits.size) for key, bits in kept.items()}))
                for key, total in _sums(kept, have, new_rows):
                    lines[key] = weights.line(total)
                    out.writelines(weights.blocks(total))
                    bar.add()
        _, left_out = weights.copy_other_files(delta, fresh)
        _write_index(fresh, dict(zip(names, shards, strict=True)), dropped)
    size = sum(path.stat().st_size for path in target.iterdir())
    told = {"tensors": len(lines), "bytes": size, "sha256": weights.fingerprint(lines), "bit_exact": False}
    return {**told, "left_out": [*left_out, *dropped]}


def _match(have: Mapping[str, Bits], wanted: Mapping[str, Bits], base: Path) -> list[str]:
    """Check that base and delta hold the same tensors; returns names of computed tables, which are left out."""
    for name in {**wanted, **have}:
        if not name.endswith(COMPUTED) and (name not in have or name not in wanted):
            lacking = f"base {base}" if name not in have else "the delta"
            raise InputError(f"{lacking} has no tensor {name}: this delta was made with another base")
    for name, bits in wanted.items():
        old = have.get(name)
        if old and (old.shape[1:] != bits.shape[1:] or old.shape[:1] > bits.shape[:1]):
            raise InputError(f"base {base}: {name} is {list(old.shape)}, the delta's {list(bits.shape)}: another base")
    return [name for name in wanted if name.endswith(COMPUTED)]


def _sums(delta: Mapping[str, Bits], base: Mapping[str, Bits], new_rows: str) -> Iterator[tuple[str, Bits]]:
    for name, bits in delta.items():
        change = _tensor(bits)
        old = _tensor(base[name]).to(change.dtype)
        more = len(change) - len(old) if change.dim() else 0
        if more:  # only then: an empty slice from -0 is the whole table
            row = old.mean(dim=0, keepdim=True) if new_rows == "mean" else torch.zeros_like(old[:1])
            old = torch.cat([old, row.expand(more, *old.shape[1:])])
        yield name, TensorBits(old.add_(change))  # in place: two tensors in memory, not three


def _tensor(bits: Bits) -> Tensor:
    if not bits.size:
        return torch.empty(bits.shape, dtype=TYPES[bits.dtype])
    return torch.frombuffer(bytearray(bits.read(0, bits.size)), dtype=TYPES[bits.dtype]).reshape(bits.shape)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, Bits]], dropped: list[str]) -> None:
    """The index that tells loaders which shard holds what; the delta's own, which names its own files, is replaced."""
    for old in folder.glob("*.index.json"):
        old.unlink()
    if len(shards) > 1:
        where = {name: file for file, shard in shards.items() for name in shard if name not in dropped}
        size = sum(bits.size for shard in shards.values() for name, bits in shard.items() if name in where)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
