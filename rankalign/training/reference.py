"""Reference log-probabilities, computed once per text, weights and numerics, whatever the run's other settings."""

from __future__ import annotations

import fcntl
import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save
from torch import Tensor

from rankalign.data.encode import TokenList
from rankalign.errors import InputError
from rankalign.storage.files import atomic_writer

Compute = Callable[[Sequence[TokenList]], list[Tensor]]
SPOT_CHECKS = 4
STORED_AT_ONCE = 256  # lists computed between two writes, and lost at most when a run is killed


def content_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """32 bytes that name the tokens of one prompt and one response, boundary included."""
    ids = [len(prompt), *prompt, *response]
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).digest()


class ReferenceCache:
    """Sums of log-probabilities by content, in one safetensors file for each (weights, numerics).

    Args:
        folder: where the files lie.
        weights: fingerprint of the reference model's weights.
        numerics: how it computes, such as ``float32-cpu``; sums of other numerics are never mixed in.

    Attributes:
        computed: how many responses had to be computed so far.
        checked: how many stored ones were computed again, to see that they still hold.
        found: how many were stored.
    """

    def __init__(self, folder: Path, weights: str, numerics: str) -> None:
        self.path = folder / f"{weights[:32]}-{numerics}.safetensors"  # 128 bits of the fingerprint
        self.computed, self.checked, self.found = 0, 0, 0
        # In 16 bits on a GPU a sum depends on what runs beside it; another model's would be off by far more.
        loose = "cuda" in numerics and not numerics.startswith("float32")
        self._rounding = (0.5, 1e-2) if loose else (1e-3, 1e-4)
        self._known: dict[bytes, float] = broadcast_object_list([self._read()])[0]  # the same in all processes

    def logps(self, lists: Sequence[TokenList], compute: Compute) -> list[Tensor]:
        """One tensor (N,) a list, from the cache or from ``compute``; new ones are stored.

        A few stored sums are computed again each time and must agree.

        Raises:
            InputError: they do not: the file belongs to something else.
        """
        fresh, known = self._sort(lists)
        self._verify(known, compute)
        self.found += sum(len(tokens.responses) for tokens in known)
        for start in range(0, len(fresh), STORED_AT_ONCE):
            some = fresh[start : start + STORED_AT_ONCE]
            for tokens, sums in zip(some, compute(some), strict=True):
                self._known.update(zip(_keys(tokens), sums.double().tolist(), strict=True))
                self.computed += len(tokens.responses)
            if PartialState().is_main_process:
                self._write()
        return [torch.tensor([self._known[key] for key in _keys(tokens)], dtype=torch.float64) for tokens in lists]

    def _sort(self, lists: Sequence[TokenList]) -> tuple[list[TokenList], list[TokenList]]:
        """What is to be computed, a response of several lists in the first of them alone, and what is stored."""
        fresh, known, seen = list[TokenList](), list[TokenList](), set(self._known)
        for tokens in lists:
            keys = _keys(tokens)
            stored = [i for i, key in enumerate(keys) if key in self._known]
            new = [i for i, key in enumerate(keys) if key not in seen]
            seen.update(keys)
            fresh += [_only(tokens, new)] if new else []
            known += [_only(tokens, stored)] if stored else []
        return fresh, known

    def _verify(self, known: list[TokenList], compute: Compute) -> None:
        step = max(len(known) // SPOT_CHECKS, 1)
        sample = known[::step][:SPOT_CHECKS]
        self.checked += sum(len(tokens.responses) for tokens in sample)
        for tokens, sums in zip(sample, compute(sample) if sample else [], strict=True):
            for key, value in zip(_keys(tokens), sums.double().tolist(), strict=True):
                least, share = self._rounding
                if abs(value - self._known[key]) > least + share * abs(value):
                    raise InputError(
                        f"{self.path}: stored reference log-probability {self._known[key]:.6g} of prompt {tokens.id!r} "
                        f"is now {value:.6g}; delete the file to compute all anew"
                    )

    def _read(self) -> dict[bytes, float]:
        if not self.path.exists():
            return {}
        stored = load_file(self.path)
        keys = stored["keys"].numpy().tobytes()
        sums = stored["logps"].tolist()
        return {keys[32 * i : 32 * i + 32]: value for i, value in enumerate(sums)}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            merged = {**self._read(), **self._known}  # another run may have added its own meanwhile
            keys = torch.frombuffer(bytearray(b"".join(merged)), dtype=torch.uint8).reshape(-1, 32)
            sums = torch.tensor(list(merged.values()), dtype=torch.float64)
            with atomic_writer(self.path) as out:
                out.write(save({"keys": keys, "logps": sums}))


def _keys(tokens: TokenList) -> list[bytes]:
    return [content_key(tokens.prompt, response) for response in tokens.responses]


def _only(tokens: TokenList, places: Sequence[int]) -> TokenList:
    """The list with some of its responses."""
    if len(places) == len(tokens.responses):
        return tokens
    return TokenList(
        tokens.id, tokens.prompt, [tokens.responses[i] for i in places], [tokens.scores[i] for i in places]
    )
