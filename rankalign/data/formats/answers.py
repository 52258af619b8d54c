"""What AlpacaEval, FastChat and Arena-Hard share: rows of one model's answer each, which become one record a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rankalign.data.formats import FORMATS, Losses
from rankalign.data.formats.common import Dropped
from rankalign.data.formats.kept import lost_details
from rankalign.data.formats.unread import says_something, unread
from rankalign.data.records import CandidateSet, Checker, Response
from rankalign.errors import RecordError
from rankalign.storage.jsonl import OnError, Row

File = tuple[str, Iterable[Row]]


@dataclass
class Table:
    """Records in the making, by prompt, in order of first sight. A row that is refused leaves nothing in them."""

    sets: dict[str, CandidateSet] = field(default_factory=dict)
    first: dict[str, Checker] = field(default_factory=dict)

    def at(self, key: str, check: Checker) -> CandidateSet:
        """The record of prompt ``key``, made where there is none."""
        self.first.setdefault(key, check)
        return self.sets.setdefault(key, CandidateSet(key, ""))

    def known(self, key: str, check: Checker, what: str) -> CandidateSet:
        """The record of prompt ``key``; a row about a prompt that has no answers here is dropped by rule."""
        if key not in self.sets:
            raise Dropped(check.file, check.line, "", f"{what} of a prompt that has no answer here")
        return self.sets[key]


@dataclass(frozen=True)
class AnswerFormat(ABC):
    """Reads rows in stages (questions, answers, verdicts), from several files where they are apart."""

    name: ClassVar[str]
    # Columns that were made something of although they are kept with the answer.
    reads: ClassVar[frozenset[str]] = frozenset()

    def unread(self, record: CandidateSet) -> list[str]:
        """The columns of the record's rows that nothing was made of and that do not just describe it."""
        kept = [response.meta.get(self.name) for response in record.responses]
        columns = {key: value for key, value in record.meta.items() if key not in FORMATS}
        note = record.meta.get(self.name)
        own = dict(note) if isinstance(note, dict) else {}
        for row in [*kept, *own.pop("annotations", []), own]:
            columns |= {key: value for key, value in (row or {}).items() if says_something(value)}
        return unread(columns, self.reads)

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from one file."""
        return self.read_files([(file, rows)], on_error)

    def read_files(self, files: Iterable[File], on_error: OnError) -> Iterator[CandidateSet]:
        """Records from the rows of all files together, in the order in which their prompts first appear."""
        staged: list[tuple[int, Checker, dict[str, Any]]] = []
        table = Table()
        for file, rows in files:
            for line, row in rows:
                check = Checker(file, line)
                try:
                    staged.append((self.stage(row, check), check, row))
                except RecordError as error:
                    on_error(error)
        for _, check, row in sorted(staged, key=lambda entry: entry[0]):  # stable: within a stage as in the files
            try:
                self.take(row, check, table)
            except RecordError as error:
                on_error(error)
        # Questions alone are prompts to be answered; beside answers, one that nobody answered is left out.
        alone = not any(record.responses for record in table.sets.values())
        for key, record in table.sets.items():
            first = table.first[key]
            record.origin = (first.file, first.line)
            if record.prompt and (record.responses or alone):
                yield record
            elif record.prompt:
                on_error(Dropped(first.file, first.line, "", "questions without an answer"))
            elif record.responses:
                left_out = f"its answers ({len(record.responses)}) are left out"
                on_error(first.fail("", f"nothing here says what prompt {key!r} asks; {left_out}"))

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """A row for each response, model by model."""
        by_policy: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            self.check_meta(record, losses)
            for policy, row in self.rows_of(record, losses):
                by_policy.setdefault(policy, []).append(row)
        for rows in by_policy.values():
            yield from rows

    def check_meta(self, record: CandidateSet, losses: Losses) -> None:
        """Count what the record knows of its prompt and rows of answers do not say."""
        for key, value in record.meta.items():
            if key != self.name and (value or key not in FORMATS):
                losses.add(f"meta.{key}")

    @abstractmethod
    def stage(self, row: dict[str, Any], check: Checker) -> int:
        """When a row is taken: 0 questions, 1 answers, 2 verdicts."""

    @abstractmethod
    def take(self, row: dict[str, Any], check: Checker, table: Table) -> None:
        """Put a row's content into the table."""

    @abstractmethod
    def rows_of(self, record: CandidateSet, losses: Losses) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a record, each with the model whose rows it stands among."""


@dataclass(frozen=True)
class LoneAnswers(AnswerFormat):
    """A format that writes a row for each answer, and nothing else."""

    def rows_of(self, record: CandidateSet, losses: Losses) -> Iterator[tuple[str, dict[str, Any]]]:
        """A row for each response."""
        lost_details(record.responses, losses, policy=False, meta=False)
        for response in record.responses:
            yield response.policy, self.row(record, response, losses)

    @abstractmethod
    def row(self, record: CandidateSet, response: Response, losses: Losses) -> dict[str, Any]:
        """One answer's row."""


def key_of(row: dict[str, Any], column: str, check: Checker) -> str:
    """What a row calls its prompt: a text or a whole number."""
    value = check.need(row, column)
    return str(value) if type(value) is int else check.text(value, column, empty=False)


def find(record: CandidateSet, policy: str, check: Checker) -> Response:
    """The response of ``policy``."""
    for response in record.responses:
        if response.policy == policy:
            return response
    raise Dropped(check.file, check.line, "", f"verdicts on {policy!r}, which has no answer here")
