"""Token lists in an Arrow file that is mapped, not read: rows by index, and no more memory than the rows in hand.

The file is a stream of record batches, which ``datasets.Dataset.from_file`` opens too. Processes that map the same file
share its pages.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from rankalign.data.encode import TokenList
from rankalign.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

NARROW = 1 << 16  # ids below it take two bytes, others four

T = TypeVar("T")


def schema(vocabulary: int) -> pa.Schema:
    """Columns of a table: what :class:`TokenList` holds, and of each row its longest text and its largest id.

    Args:
        vocabulary: how many ids there are, which decides how wide they are stored.
    """
    import pyarrow as pa

    token = pa.uint16() if vocabulary <= NARROW else pa.uint32()
    return pa.schema({
        "id": pa.string(),
        "prompt": pa.list_(token),
        "responses": pa.list_(pa.list_(token)),
        "scores": pa.list_(pa.float64()),
        "unlearned": pa.list_(pa.list_(pa.uint32())),
        "axes": pa.list_(pa.list_(pa.float64())),
        "own": pa.list_(pa.uint8()),
        "longest": pa.uint32(),
        "largest": pa.uint32(),
    })  # fmt: skip


def to_batch(lists: Sequence[TokenList], vocabulary: int) -> pa.RecordBatch:
    """Lists as rows.

    Raises:
        InputError: an id beyond the vocabulary, which only a record that brings its own ids can hold.
    """
    import pyarrow as pa

    kinds = schema(vocabulary)
    told: list[list[Any]] = [[], [], [], [], [], [], []]
    for t in lists:
        spans = [[i for span in spans for i in span] for spans in t.unlearned]
        scores, axes = [*map(float, t.scores)], [[*map(float, row)] for row in t.axes]
        own = [*map(int, t.own)]
        for column, value in zip(told, (t.id, t.prompt, t.responses, scores, spans, axes, own), strict=True):
            column.append(value)
    try:
        columns = [pa.array(column, kinds.field(i).type) for i, column in enumerate(told)]
    except (pa.ArrowInvalid, OverflowError):
        raise _beyond(lists, vocabulary) from None
    longest = [len(t.prompt) + max(map(len, t.responses), default=0) for t in lists]
    largest = [max(max(ids, default=0) for ids in (t.prompt, *t.responses)) for t in lists]
    columns += [pa.array(column, pa.uint32()) for column in (longest, largest)]
    return pa.record_batch(columns, schema=kinds)


def _beyond(lists: Sequence[TokenList], vocabulary: int) -> InputError:
    """The error for ids that the columns cannot hold."""
    tokens, ident = max(
        ((t, i) for t in lists for ids in (t.prompt, *t.responses) for i in ids), key=lambda one: one[1]
    )
    return InputError(
        f"prompt {tokens.id!r} holds token id {ident}, and the tokenizer knows {vocabulary}: its responses were drawn "
        "with another one; take their `tokens` out of the records"
    )


def write_table(path: str | os.PathLike[str], batches: Iterable[pa.RecordBatch], vocabulary: int) -> None:
    """Write a table; the caller sees to it that nobody finds it half written."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, schema(vocabulary)) as writer:
        for batch in batches:
            writer.write_batch(batch)


class TokenTable(Sequence[TokenList]):
    """The lists of a file that :func:`write_table` wrote, each made when it is asked for.

    Attributes:
        longest: (rows,) tokens of each prompt with its longest response.
        largest: (rows,) the largest token id of each row.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import pyarrow as pa

        self.path = str(path)
        with pa.memory_map(self.path) as source:
            table = pa.ipc.open_stream(source).read_all()  # slices of the mapping: nothing is read yet
        self._ids = table.column("id")
        self._batches = table.to_batches()
        self._starts = list(accumulate((len(batch) for batch in self._batches), initial=0))
        self.longest, self.largest = (np.asarray(table.column(name)) for name in ("longest", "largest"))

    def __reduce__(self) -> tuple[type[TokenTable], tuple[str]]:
        return TokenTable, (self.path,)  # a worker of another process maps the file itself

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> TokenList: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenList]: ...
    def __getitem__(self, index: int | slice) -> TokenList | list[TokenList]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, place) - 1
        batch, row = self._batches[number], place - self._starts[number]
        ident, prompt, responses, scores, spans, axes, own = (batch.column(i)[row] for i in range(7))
        unlearned = [tuple(zip(flat[::2], flat[1::2], strict=True)) for flat in _lists(spans)]
        prompts, rated = prompt.values.to_numpy().tolist(), scores.values.to_numpy().tolist()
        wrote = own.values.to_numpy().astype(bool).tolist()
        return TokenList(ident.as_py(), prompts, _lists(responses), rated, _lists(axes), unlearned, wrote)

    def repeated(self) -> tuple[str, int] | None:
        """An id that stands more than once, with how often; None where there is none."""
        import pyarrow.compute as pc

        found = pc.value_counts(self._ids)
        many = found.filter(pc.greater(found.field("counts"), 1))
        return (many[0]["values"].as_py(), many[0]["counts"].as_py()) if len(many) else None


def _lists(cell: Any) -> list[list[Any]]:
    """A cell that is a list of lists of numbers; by way of numpy, which is many times faster than number by number."""
    flat, ends = cell.values.values.to_numpy(), cell.values.offsets.to_numpy().tolist()
    return [flat[start:end].tolist() for start, end in pairwise(ends)]


class Joined(Sequence[T]):
    """Sequences one behind the other, without a copy of what is in them.

    Attributes:
        parts: the sequences.
    """

    def __init__(self, *parts: Sequence[T]) -> None:
        self.parts = parts
        self._starts = list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, place) - 1  # behind parts that are empty
        return self.parts[number][place - self._starts[number]]

    def __iter__(self) -> Iterator[T]:
        for part in self.parts:
            yield from part
