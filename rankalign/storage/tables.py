"""Tables: Parquet files and the folders of Hugging Face ``datasets`` (``save_to_disk``), both ways.

A cell is what JSON would have there, so that every format reads tables as it reads JSON Lines: a null cell is ``null``,
NaN is refused, the row takes the place of the line. Two things that tables cannot say are said in Arrow's JSON type,
which ``datasets`` reads as its ``Json`` feature: a column that only some rows have (a null cell there means that the
row has no such column), and a column whose values have no one type that gives each of them back as it was.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rankalign.errors import InputError, RecordError
from rankalign.storage.files import atomic_writer, open_raw
from rankalign.storage.folders import new_folder
from rankalign.storage.jsonl import OnError, Row, dumps, give_up, loads

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000  # rows
IN_MEMORY = 1 << 26  # bytes of rows kept aside; more goes to disk


# --- reading -----------------------------------------------------------------------------------------------------


class _Cell(Exception):
    """A cell that JSON cannot hold: its path and the reason."""


def read_table(path: str | os.PathLike[str], on_error: OnError | None = None) -> Iterator[Row]:
    """Yield ``(row number, object)`` of a Parquet file or a ``datasets`` folder, a batch in memory at a time.

    Raises:
        InputError: the file or folder is missing or damaged, or the folder holds several splits.
    """
    number, report = 0, on_error or give_up
    for batch in _batches(path):
        types = {field.name: field.type for field in batch.schema}
        if len(types) < len(batch.schema):
            raise InputError(f"{path}: two columns have the same name")
        for cells in _checked(path, batch):
            number += 1
            try:
                row = {
                    name: _json(value, types[name], name) for name, value in cells.items() if _there(value, types[name])
                }
            except _Cell as error:
                report(RecordError(str(path), number, *error.args))
            else:
                yield number, row


def _batches(path: str | os.PathLike[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if os.path.isdir(path):
            yield from _open_folder(path).with_format("arrow").iter(BATCH)
        else:
            with open_raw(path) as raw, pq.ParquetFile(raw) as table:
                yield from table.iter_batches(BATCH)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, or no folder written by `datasets`") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _open_folder(path: str | os.PathLike[str]) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: is no folder that `datasets` can read: {error}") from None
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    raise InputError(f"{path}: holds several splits; name one: {', '.join(f'{path}/{name}' for name in found)}")


def _checked(path: str | os.PathLike[str], batch: Any) -> list[dict[str, Any]]:
    try:
        # By default a map becomes a list of pairs; the strict way also refuses a key that stands twice.
        return list(batch.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, KeyError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{path}: holds a value that cannot be read: {error}") from None


# Where a null would be read as one by a chat template: arguments of a call, descriptions of tools.
_FILLED = re.compile(r"(?:^|\.)(?:arguments|tools)(?:$|[.\[])")


def _there(value: Any, kind: pa.DataType) -> bool:
    return value is not None or not _is_json(kind)


def _is_json(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _json(value: Any, kind: pa.DataType, path: str) -> Any:
    """A cell as the JSON value that stands for it."""
    if _is_json(kind) and isinstance(value, str):
        try:
            return loads(value)
        except ValueError as error:
            raise _Cell(path, str(error)) from None
    if isinstance(value, list):
        inner = getattr(kind, "value_type", kind)
        return [_json(element, inner, f"{path}[{index}]") for index, element in enumerate(value)]
    if isinstance(value, dict):
        # Arrow gives every struct of a column the fields of all: another tool's argument, as null, is no argument.
        filled = bool(_FILLED.search(path)) and not hasattr(kind, "item_type")
        there = {key: element for key, element in value.items() if not (filled and element is None)}
        return {key: _json(element, _field(kind, key), f"{path}.{key}") for key, element in there.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise _Cell(path, "is not a finite number")
    if isinstance(value, date | time):
        return value.isoformat()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise _Cell(path, f"holds {type(value).__name__}, for which JSON has no form")


def _field(kind: pa.DataType, key: str) -> pa.DataType:
    """The type of one field of a struct, or of a map's values."""
    return kind.item_type if hasattr(kind, "item_type") else kind.field(key).type


# --- writing -----------------------------------------------------------------------------------------------------


def write_parquet(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as a Parquet file, atomically; return how many.

    Raises:
        InputError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    with _Spool(rows) as spool, atomic_writer(path) as out, pq.ParquetWriter(out, spool.schema()) as writer:
        for batch in spool.batches():
            writer.write_batch(batch)
    return spool.count


def write_folder(path: str | os.PathLike[str], splits: Mapping[str, Iterable[dict[str, Any]]]) -> dict[str, int]:
    """Write a folder as ``save_to_disk`` does, atomically; return how many rows by split.

    Args:
        path: a folder that is not there yet.
        splits: rows by split, written as a ``DatasetDict``; a split named ``""`` alone is written as a ``Dataset``.

    Raises:
        InputError: the folder is there already, cannot be written or would hold no rows.
    """
    import datasets

    datasets.disable_progress_bars()
    counts: dict[str, int] = {}
    try:
        # `datasets` maps the streams that it reads, so they live until the folder is saved.
        with new_folder(path) as fresh, tempfile.TemporaryDirectory() as streams:
            tables = {}
            for index, (name, rows) in enumerate(splits.items()):
                stream = Path(streams) / f"{index}.arrow"
                counts[name] = _write_stream(stream, rows)
                if not counts[name]:
                    raise InputError(f"{path}: `datasets` reads no folder without rows; write a file")
                tables[name] = datasets.Dataset.from_file(str(stream))
            whole = tables[""] if list(tables) == [""] else datasets.DatasetDict(tables)
            whole.save_to_disk(fresh)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return counts


def _write_stream(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    import pyarrow as pa

    with _Spool(rows) as spool, pa.ipc.new_stream(str(path), spool.schema()) as writer:
        for batch in spool.batches():
            writer.write_batch(batch)
    return spool.count


class _Column:
    """What was seen of one column: its type so far (None where none fits exactly), and in how many rows it stood."""

    def __init__(self) -> None:
        import pyarrow as pa

        self.kind: pa.DataType | None = pa.null()
        self.count = 0
        self.large = False

    def add(self, values: list[Any]) -> None:
        self.count += len(values)
        if self.kind is not None:
            self.large = self.large or _any_large(values)
            self.kind = _merged(self.kind, _exact_type(values), self.large)


class _Spool:
    """Rows kept aside, in memory or on disk, until the types of all columns are known."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.columns: dict[str, _Column] = {}
        self.count = 0
        self.kept: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  (closed by __exit__)
        stream = iter(rows)
        while batch := list(islice(stream, BATCH)):
            self.count += len(batch)
            self.kept.writelines(dumps(row).encode("utf-8") + b"\n" for row in batch)
            for name in dict.fromkeys(name for row in batch for name in row):
                self.columns.setdefault(name, _Column()).add([row[name] for row in batch if name in row])

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.kept.close()

    def schema(self) -> pa.Schema:
        """Types of all columns."""
        import pyarrow as pa

        whole = {name: column.kind if column.count == self.count else None for name, column in self.columns.items()}
        return pa.schema([(name, pa.json_() if kind is None else kind) for name, kind in whole.items()])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows under that schema."""
        import pyarrow as pa

        schema = self.schema()
        self.kept.seek(0)
        while lines := list(islice(self.kept, BATCH)):
            rows = [json.loads(line) for line in lines]
            yield pa.record_batch([_array(rows, field.name, field.type) for field in schema], schema=schema)


def _array(rows: list[dict[str, Any]], name: str, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if not _is_json(kind):
        return pa.array([row[name] for row in rows], kind)
    texts = pa.array([dumps(row[name]) if name in row else None for row in rows], pa.string())
    return pa.ExtensionArray.from_storage(kind, texts)


def _exact_type(values: list[Any]) -> pa.DataType | None:
    """The Arrow type that gives every value back as it was, or None."""
    import pyarrow as pa

    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError):
        return None
    return array.type if _same(array.to_pylist(), values) and not _has_empty_object(array.type) else None


def _same(one: Any, other: Any) -> bool:
    """Equality in which true and 1 differ."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _has_empty_object(kind: pa.DataType) -> bool:
    """Parquet has no objects without fields."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return (not inner and str(kind).startswith("struct")) or any(map(_has_empty_object, inner))


def _any_large(value: Any) -> bool:
    """Whether a whole number is among the values that a double cannot hold."""
    if isinstance(value, list):
        return any(map(_any_large, value))
    if isinstance(value, dict):
        return any(map(_any_large, value.values()))
    return isinstance(value, int) and not -(2**53) <= value <= 2**53


def _merged(one: pa.DataType, other: pa.DataType | None, large: bool = False) -> pa.DataType | None:
    """The type that gives back the values of both exactly, or None; ``large``: some whole number has no double."""
    import pyarrow as pa

    if other is None or pa.types.is_null(one):
        return other
    if one == other or pa.types.is_null(other):
        return one
    if {one, other} == {pa.int64(), pa.float64()}:
        return None if large else pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _merged(one.value_type, other.value_type, large)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other) and set(one.names) == set(other.names):
        fields = {name: _merged(one.field(name).type, other.field(name).type, large) for name in one.names}
        return None if None in fields.values() else pa.struct(list(fields.items()))
    return None
