"""Sequences of records that memory need not hold: they wait in a temporary file and are read when asked for."""

from __future__ import annotations

import dataclasses
import operator
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import msgspec

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import Line
from rankalign.storage.jsonl import dumps, loads

S = TypeVar("S")
T = TypeVar("T")

IN_MEMORY = 1 << 22
"""Characters of text up to which records stay in memory: of so few the file would cost more than it saves."""
_BLOCK = 1 << 20  # bytes written or read at once when all are passed through


class View(Sequence[T]):
    """Elements of another sequence, some of them or in another order, each made into something else when asked for.

    Args:
        source: the other sequence.
        at: places in it.
        make: what becomes of an element; nothing by default.

    Attributes:
        at: the places.
    """

    def __init__(self, source: Sequence[S], at: Sequence[int], make: Callable[[S], T] | None = None) -> None:
        self._source: Sequence[Any] = source
        self._make: Callable[[Any], T] | None = make
        self.at = at

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return View(self._source, self.at[index], self._make)
        found = self._source[self.at[index]]
        made: T = self._make(found) if self._make else found
        return made

    def __iter__(self) -> Iterator[T]:
        whole = self.at == range(len(self._source))
        # In order a spool reads blocks, and not each record for itself.
        found: Iterator[Any] = iter(self._source) if whole else (self._source[at] for at in self.at)
        return map(self._make, found) if self._make else found


class Spool(Sequence[CandidateSet]):
    """Records that a reader yields, once through and to be read again as often as it takes.

    Few of them are kept as they are. Of many, one that is asked for is made anew: whoever changes it changes a copy.

    Args:
        records: as readers make them, so of values that JSON has; all are taken at once.
        in_memory: see :data:`IN_MEMORY`, which is read at the call.
    """

    def __init__(self, records: Iterable[CandidateSet], in_memory: int | None = None) -> None:
        most = IN_MEMORY if in_memory is None else in_memory
        self._kept: list[CandidateSet] | None = []
        size, stream = 0, iter(records)
        for record in stream:
            self._kept.append(record)
            size += sum(len(response.text) for response in record.responses) + len(record.prompt)
            if size > most:
                break
        else:
            return
        self._starts = array("Q", [0])
        self._file = tempfile.TemporaryFile(buffering=_BLOCK)  # noqa: SIM115  (it lives as long as this object)
        for first in self._kept:
            self._put(first)
        self._kept = None
        for record in stream:
            self._put(record)
        self._file.flush()

    def _put(self, record: CandidateSet) -> None:
        self._starts.append(self._starts[-1] + self._file.write(_pack(record)))

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._kept is None else len(self._kept)

    @overload
    def __getitem__(self, index: int) -> CandidateSet: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CandidateSet]: ...
    def __getitem__(self, index: int | slice) -> CandidateSet | Sequence[CandidateSet]:
        if self._kept is not None:
            return self._kept[index]
        if isinstance(index, slice):
            return View(self, range(len(self))[index])
        at = range(len(self))[index]
        start, end = self._starts[at], self._starts[at + 1]
        return _unpack(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[CandidateSet]:
        return iter(self._kept) if self._kept is not None else self._through()

    def _through(self) -> Iterator[CandidateSet]:
        at, count = 0, len(self)
        while at < count:
            start, last = self._starts[at], at + 1
            while last < count and self._starts[last + 1] - start <= _BLOCK:
                last += 1
            block = memoryview(os.pread(self._file.fileno(), self._starts[last] - start, start))
            for index in range(at, last):
                yield _unpack(block[self._starts[index] - start : self._starts[index + 1] - start])
            at = last


_ENCODE, _DECODE = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
_parts = operator.attrgetter(*(field.name for field in dataclasses.fields(Response)))
_JSON = b"["  # begins no array of MessagePack's with five elements


def _pack(record: CandidateSet) -> bytes:
    file, line = record.origin or ("", None)
    place = (line.element, line.file, line.row) if isinstance(line, Line) else None
    responses = [_parts(response) for response in record.responses]
    origin = None if line is None else (file, int(line), place)
    content = (record.id, record.prompt, responses, record.meta, origin)
    try:
        # Gives back every value of JSON exactly, in a fifth of json's time; but for whole numbers beyond 64 bits.
        return _ENCODE(content)
    except OverflowError:
        return dumps(content).encode("utf-8")


def _unpack(block: bytes | memoryview) -> CandidateSet:
    whole = block[:1] == _JSON
    ident, prompt, responses, meta, origin = loads(bytes(block).decode("utf-8")) if whole else _DECODE(block)
    place: tuple[str, int] | None = None
    if origin is not None:
        file, line, further = origin
        place = (file, line if further is None else Line.of(line, *further))
    return CandidateSet(ident, prompt, [Response(*response) for response in responses], meta, place)
