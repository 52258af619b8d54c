"""Reference log-probabilities, computed once per text, weights and numerics, whatever the run's other settings."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from rankalign.data.encode import Spans, TokenList
from rankalign.errors import InputError
from rankalign.training.reference_table import ReferenceTable, Values

Compute = Callable[[Sequence[TokenList]], list[Tensor]]
SPOT_CHECKS = 4
TOKENS_A_ROW = 8  # of a table of tokens: key and check are then 5 bytes a token, and a short answer wastes few
STORED_AT_ONCE = 256  # lists computed between two writes, and lost at most when a run is killed


def content_key(prompt: Sequence[int], response: Sequence[int], unlearned: Spans = ()) -> bytes:
    """32 bytes that name the tokens of one prompt and one response, boundary included, and which of them count."""
    ids = [len(prompt), *prompt, *response]
    # No token is negative, so that no response without spans has the key of one with them.
    ids += [number for start, end in unlearned for number in (-1 - start, -1 - end)]
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).digest()


class ReferenceCache:
    """Log-probabilities by content, in one table for each (weights, numerics): sums, or in another those of tokens.

    Args:
        folder: where the tables lie.
        weights: fingerprint of the reference model's weights.
        numerics: how it computes, such as ``float32-cpu``; values of other numerics are never mixed in.
        tokens: keep the log-probability of every counted token, at 13 bytes each, and not the sum of a response's.

    Attributes:
        computed: how many responses had to be computed so far.
        checked: how many stored ones were computed again, to see that they still hold.
        found: how many were stored.
    """

    def __init__(self, folder: Path, weights: str, numerics: str, tokens: bool = False) -> None:
        kind = "-tokens" if tokens else ""
        self.path = folder / f"{weights[:32]}-{numerics}{kind}.table"  # 128 bits of the fingerprint
        self.tokens = tokens
        self.computed, self.checked, self.found = 0, 0, 0
        # In 16 bits on a GPU a sum depends on what runs beside it.
        self._loose = "cuda" in numerics and not numerics.startswith("float32")
        self._table = ReferenceTable(self.path, TOKENS_A_ROW if tokens else 1)
        self._unchecked = SPOT_CHECKS if len(self._table) else 0  # what this run has stored itself needs no check

    def logps(self, lists: Sequence[TokenList], compute: Compute) -> list[Tensor]:
        """One tensor (N,) a list, or (N, T) of tokens, from the cache or from ``compute``; new ones are stored.

        A few of the first stored responses are computed again and their sums must agree.

        Raises:
            InputError: they do not: the file belongs to something else.
        """
        keys = [_keys(tokens) for tokens in lists]
        sizes = {key: size for own, tokens in zip(keys, lists, strict=True) for key, size in self._sizes(own, tokens)}
        known = self._find(sizes)
        fresh, stored = _sort(lists, keys, known)
        self._verify(stored, known, compute)
        self.found += sum(len(tokens.responses) for tokens in stored)
        for start in range(0, len(fresh), STORED_AT_ONCE):
            some, new = fresh[start : start + STORED_AT_ONCE], dict[bytes, Values]()
            for tokens, found in zip(some, compute(some), strict=True):
                new.update(self._values(tokens, found))
                self.computed += len(tokens.responses)
            self._store(new)
            known |= new
        return [self._rows([known[key] for key in own]) for own in keys]

    def _sizes(self, keys: Sequence[bytes], tokens: TokenList) -> Iterable[tuple[bytes, int]]:
        """How many values each response has."""
        return zip(keys, tokens.lengths if self.tokens else [1] * len(keys), strict=True)

    def _values(self, tokens: TokenList, found: Tensor) -> Iterator[tuple[bytes, Values]]:
        """What was computed of each response, (N,) or (N, T), by its key."""
        rows = found.double().reshape(len(found), -1).tolist()
        for (key, size), row in zip(self._sizes(_keys(tokens), tokens), rows, strict=True):
            yield key, tuple(row[:size])

    def _rows(self, values: Sequence[Values]) -> Tensor:
        """(N,), or (N, T) with 0 behind the tokens of shorter responses."""
        if not self.tokens:
            return torch.tensor([value for (value,) in values], dtype=torch.float64)
        longest = max(map(len, values), default=0)
        return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in values], dtype=torch.float64)

    def _find(self, sizes: Mapping[bytes, int]) -> dict[bytes, Values]:
        """What is stored of responses with so many values each, those that are whole."""
        rows = {key: _row_keys(key, size) if self.tokens else [key] for key, size in sizes.items()}
        flat = iter(self._table.find([row for own in rows.values() for row in own]))
        known = dict[bytes, Values]()
        for key, own in rows.items():
            parts = [next(flat) for _ in own]
            whole = [part for part in parts if part is not None]
            if len(whole) == len(parts):
                known[key] = tuple(chain.from_iterable(whole))[: sizes[key]]
        return known

    def _store(self, new: Mapping[bytes, Values]) -> None:
        if not self.tokens:
            self._table.add(dict(new))
            return
        rows = dict[bytes, Values]()
        for key, values in new.items():
            for i, row in enumerate(_row_keys(key, len(values))):
                part = values[i * TOKENS_A_ROW : (i + 1) * TOKENS_A_ROW]
                rows[row] = part + (0.0,) * (TOKENS_A_ROW - len(part))
        self._table.add(rows)

    def _verify(self, stored: list[TokenList], known: Mapping[bytes, Values], compute: Compute) -> None:
        step = max(len(stored) // SPOT_CHECKS, 1)
        sample = stored[::step][: self._unchecked]
        self._unchecked -= len(sample)
        self.checked += sum(len(tokens.responses) for tokens in sample)
        for tokens, found in zip(sample, compute(sample) if sample else [], strict=True):
            for (key, values), answer in zip(self._values(tokens, found), tokens.responses, strict=True):
                now, then = sum(values), sum(known[key])
                if abs(now - then) > self._rounding(now, len(answer)):
                    raise InputError(
                        f"{self.path}: stored reference log-probability {then:.6g} of prompt {tokens.id!r} "
                        f"is now {now:.6g}; delete the file to compute all anew"
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
    lists: Sequence[TokenList], keys: Sequence[Sequence[bytes]], known: Mapping[bytes, Values]
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


def _row_keys(key: bytes, size: int) -> list[bytes]:
    """Of the rows that hold the tokens of a response."""
    rows = -(-size // TOKENS_A_ROW)
    return [hashlib.blake2b(key + struct.pack("<q", row), digest_size=32).digest() for row in range(rows)]


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
        own=[tokens.own[i] for i in places] if tokens.own else [],
    )
