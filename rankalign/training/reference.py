"""Reference log-probabilities, computed once per text, weights and numerics, whatever the run's other settings."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankalign.data.encode import Spans, TokenList
from rankalign.errors import InputError
from rankalign.training.reference_table import ReferenceTable

Compute = Callable[[Sequence[TokenList]], list[Tensor]]
SPOT_CHECKS = 4
STORED_AT_ONCE = 256  # lists computed between two writes, and lost at most when a run is killed


def content_key(prompt: Sequence[int], response: Sequence[int], unlearned: Spans = ()) -> bytes:
    """32 bytes that name the tokens of one prompt and one response, boundary included, and which of them count."""
    ids = [len(prompt), *prompt, *response]
    # No token is negative, so that no response without spans has the key of one with them.
    ids += [number for start, end in unlearned for number in (-1 - start, -1 - end)]
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).digest()


class ReferenceCache:
    """Sums of log-probabilities by content, in one table for each (weights, numerics).

    Args:
        folder: where the tables lie.
        weights: fingerprint of the reference model's weights.
        numerics: how it computes, such as ``float32-cpu``; sums of other numerics are never mixed in.

    Attributes:
        computed: how many responses had to be computed so far.
        checked: how many stored ones were computed again, to see that they still hold.
        found: how many were stored.
    """

    def __init__(self, folder: Path, weights: str, numerics: str) -> None:
        self.path = folder / f"{weights[:32]}-{numerics}.table"  # 128 bits of the fingerprint
        self.computed, self.checked, self.found = 0, 0, 0
        # In 16 bits on a GPU a sum depends on what runs beside it.
        self._loose = "cuda" in numerics and not numerics.startswith("float32")
        self._table = ReferenceTable(self.path)
        self._unchecked = SPOT_CHECKS if len(self._table) else 0  # what this run has stored itself needs no check

    def logps(self, lists: Sequence[TokenList], compute: Compute) -> list[Tensor]:
        """One tensor (N,) a list, from the cache or from ``compute``; new ones are stored.

        A few of the first stored sums are computed again and must agree.

        Raises:
            InputError: they do not: the file belongs to something else.
        """
        keys = [_keys(tokens) for tokens in lists]
        flat = list(dict.fromkeys(key for some in keys for key in some))
        known = {key: value for key, value in zip(flat, self._table.find(flat), strict=True) if value is not None}
        fresh, stored = _sort(lists, keys, known)
        self._verify(stored, known, compute)
        self.found += sum(len(tokens.responses) for tokens in stored)
        for start in range(0, len(fresh), STORED_AT_ONCE):
            some, new = fresh[start : start + STORED_AT_ONCE], dict[bytes, float]()
            for tokens, sums in zip(some, compute(some), strict=True):
                new.update(zip(_keys(tokens), sums.double().tolist(), strict=True))
                self.computed += len(tokens.responses)
            self._table.add(new)
            known |= new
        return [torch.tensor([known[key] for key in some], dtype=torch.float64) for some in keys]

    def _verify(self, stored: list[TokenList], known: Mapping[bytes, float], compute: Compute) -> None:
        step = max(len(stored) // SPOT_CHECKS, 1)
        sample = stored[::step][: self._unchecked]
        self._unchecked -= len(sample)
        self.checked += sum(len(tokens.responses) for tokens in sample)
        for tokens, sums in zip(sample, compute(sample) if sample else [], strict=True):
            for key, value, answer in zip(_keys(tokens), sums.double().tolist(), tokens.responses, strict=True):
                if abs(value - known[key]) > self._rounding(value, len(answer)):
                    raise InputError(
                        f"{self.path}: stored reference log-probability {known[key]:.6g} of prompt {tokens.id!r} "
                        f"is now {value:.6g}; delete the file to compute all anew"
                    )

    def said(self) -> str:
        """What was computed and found so far, in words."""
        again = f", {self.checked} stored ones computed again as a check" if self.checked else ""
        return f"reference: {self.computed} responses computed{again}, {self.found} from {self.path}"

    def _rounding(self, value: float, length: int) -> float:
        """What a sum over ``length`` tokens may be off by. In bfloat16 the errors of tokens are nearly independent
        (0.03 nats each of a model of 135M weights), so they grow with the root: three times what it lost at worst."""
        return 0.1 + 0.2 * math.sqrt(length) if self._loose else 1e-3 + 1e-4 * abs(value)


def _sort(
    lists: Sequence[TokenList], keys: Sequence[Sequence[bytes]], known: Mapping[bytes, float]
) -> tuple[list[TokenList], list[TokenList]]:
    """What is to be computed, a response of several lists in the first of them alone, and what is stored."""
    fresh, stored, seen = list[TokenList](), list[TokenList](), set(known)
    for tokens, own in zip(lists, keys, strict=True):
        there = [i for i, key in enumerate(own) if key in known]
        new = [i for i, key in enumerate(own) if key not in seen]
        seen.update(own)
        fresh += [_only(tokens, new)] if new else []
        stored += [_only(tokens, there)] if there else []
    return fresh, stored


def _keys(tokens: TokenList) -> list[bytes]:
    spans = tokens.unlearned or [()] * len(tokens.responses)
    return [content_key(tokens.prompt, *each) for each in zip(tokens.responses, spans, strict=True)]


def _only(tokens: TokenList, places: Sequence[int]) -> TokenList:
    """The list with some of its responses."""
    if len(places) == len(tokens.responses):
        return tokens
    # No axes: what they score has no reference.
    spans = [tokens.unlearned[i] for i in places] if tokens.unlearned else []
    return TokenList(
        tokens.id,
        tokens.prompt,
        [tokens.responses[i] for i in places],
        [tokens.scores[i] for i in places],
        unlearned=spans,
    )
