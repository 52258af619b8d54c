"""Our own record as a format, so that ``convert`` can check, merge and re-encode it like any other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.ids import SeenIds
from rankalign.data.records import CandidateSet, made, to_dict
from rankalign.errors import RecordError
from rankalign.storage.jsonl import OnError, Row


class Native:
    """One :class:`CandidateSet` a row."""

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records as they are; a second record of one id is an error. Rows may be records already."""
        seen = SeenIds()
        for line, row in rows:
            try:
                record = made(row, file, line)
                if earlier := seen.earlier(record.id):
                    raise RecordError(file, line, "id", f"{record.id!r} stands already {earlier}")
            except RecordError as error:
                on_error(error)
            else:
                seen.add(record.id, line)
                yield record

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """Records as they are; nothing is lost."""
        yield from map(to_dict, records)


FORMAT = Native()
