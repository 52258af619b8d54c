"""Records to tokens, a piece at a time and in several processes, in the order and with the counts of one."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from rankalign.data.encode import EncodeOptions, Encoder, TokenList
from rankalign.data.records import CandidateSet
from rankalign.errors import RecordError

T = TypeVar("T")
PIECE = 256  # records: large against a message between processes, small against the memory
WORTH_IT = 2048  # records from which on workers, which take a moment to start, are used unasked
AHEAD = 3  # pieces waiting for each worker


@dataclass(frozen=True)
class Piece(Generic[T]):
    """What became of some records.

    Attributes:
        made: their token lists, in the shape that was asked for.
        counts: of :class:`rankalign.data.encode.Encoder`.
        errors: of the records that the model's chat template refuses.
        records: how many there were.
    """

    made: T
    counts: dict[str, int]
    errors: list[RecordError]
    records: int


def tokenise(
    records: Iterable[CandidateSet],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodeOptions,
    shape: Callable[[list[TokenList]], T],
    num_proc: int = 1,
) -> Iterator[Piece[T]]:
    """Pieces of encoded records, in order; at most a few of them are in memory.

    Args:
        records: read in this process, as they are asked for.
        tokenizer: the model's.
        options: how.
        shape: what to make of the lists of a piece, where they are encoded.
        num_proc: worker processes; 1 encodes here, 0 takes one a core where there are enough records.
    """
    encoder, stream = Encoder(tokenizer, options), iter(records)
    if num_proc == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        first = list(islice(stream, WORTH_IT)) if cores > 1 else []
        num_proc, stream = (cores if len(first) == WORTH_IT else 1), chain(first, stream)
    pieces = iter(lambda: list(islice(stream, PIECE)), [])
    if num_proc == 1:
        for piece in pieces:
            yield _encode(encoder, shape, piece)
    else:
        yield from _in_workers(encoder, shape, pieces, num_proc)


def _encode(encoder: Encoder, shape: Callable[[list[TokenList]], T], records: list[CandidateSet]) -> Piece[T]:
    encoder.counts.clear()
    lists, errors = list[TokenList](), list[RecordError]()
    for record in records:
        try:
            tokens = encoder.encode(record)
        except RecordError as error:
            errors.append(error)
        else:
            lists += [] if tokens is None else [tokens]
    return Piece(shape(lists), dict(encoder.counts), errors, len(records))


# --- workers -----------------------------------------------------------------------------------------------------

_worker: tuple[Encoder, Callable[[list[TokenList]], Any]]


def _start(encoder: Encoder, shape: Callable[[list[TokenList]], Any], parent: int) -> None:
    global _worker
    _worker = encoder, shape
    gc.freeze()  # a collector that walks the parent's objects would copy the pages on which they lie
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them all; the parent says what becomes of it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """A killed parent cannot tell its workers, which would wait for the next piece for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_there(records: list[CandidateSet]) -> Piece[Any]:
    return _encode(*_worker, records)


def _in_workers(
    encoder: Encoder, shape: Callable[[list[TokenList]], T], pieces: Iterator[list[CandidateSet]], num_proc: int
) -> Iterator[Piece[T]]:
    # Forked, for a fresh interpreter would take seconds to import what is here already. No model is loaded yet.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), _start, (encoder, shape, os.getpid()))
    waiting: deque[Future[Piece[Any]]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_encode_there, piece))
            if len(waiting) >= AHEAD * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        with contextlib.suppress(Exception):
            pool.shutdown(wait=False, cancel_futures=True)
