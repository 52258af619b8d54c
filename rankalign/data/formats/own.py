"""A format of the user's: a function from a row to a record, or from a record to its rows, in a file of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Dropped
from rankalign.data.ids import FreshIds
from rankalign.data.records import CandidateSet, parse, to_dict
from rankalign.errors import InputError, RecordError, number_of
from rankalign.storage.code import as_input_error, load_code
from rankalign.storage.jsonl import OnError, Row


class Own:
    """Reads by ``function(row)``, which gives a record (an object as :func:`rankalign.data.records.to_dict` makes it,
    whose ``id`` may be left out, or a :class:`CandidateSet`), or None for a row that it leaves out; writes by
    ``function(record)``, which takes such an object and gives a row or a list of rows.

    Args:
        spec: ``module:name`` or ``path/file.py:name``.

    Raises:
        InputError: there is no such function.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._function = load_code(spec, f"format {spec}")[0]

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from rows, in order; a row that the function fails at goes to ``on_error`` and is left out."""
        ids = FreshIds()
        for line, row in rows:
            try:
                record = self._record(row, file, line)
            except RecordError as error:
                on_error(error)
                continue
            free = record.id and record.id not in ids.seen
            record.id = ids.take(record.id if free else f"row-{number_of(line):06d}")
            record.origin = (file, line)
            yield record

    def _record(self, row: dict[str, Any], file: str, line: int) -> CandidateSet:
        try:
            with as_input_error(f"format {self.spec}"):
                made = self._function(dict(row))
        except RecordError:
            raise
        except InputError as error:
            raise RecordError(file, line, "", str(error)) from error
        if made is None:
            raise Dropped(file, line, "", f"rows that {self.spec} leaves out")
        if isinstance(made, CandidateSet):
            return made
        if not isinstance(made, dict):
            raise RecordError(file, line, "", f"format {self.spec} returned a {type(made).__name__}, not a record")
        found = parse({"id": "row", **made}, file, line)
        found.id = str(made.get("id", ""))
        return found

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """Rows from records, in order; what the function makes of a record is its own affair.

        Raises:
            InputError: it failed, or gave something that is no row.
        """
        for record in records:
            with as_input_error(f"format {self.spec}"):
                made = self._function(to_dict(record))
            rows = made if isinstance(made, list) else [made]
            if not all(isinstance(row, dict) for row in rows):
                raise InputError(f"format {self.spec} must return a row or a list of rows, as objects")
            if not rows:
                losses.add(f"records that {self.spec} leaves out")
            yield from rows
