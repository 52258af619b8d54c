"""What the format files share: rows that are records, pairs, ids, prompts as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rankalign.data.formats import FORMATS, Losses
from rankalign.data.formats.answered import answer_messages
from rankalign.data.formats.kept import complete, lost_details, lost_sizes, note_of
from rankalign.data.formats.ranking import pick_judge, strict_pairs
from rankalign.data.formats.system import put_system, take_system, without_system
from rankalign.data.formats.unread import NOTHING, Ignored, refusal, unread
from rankalign.data.ids import FreshIds
from rankalign.data.messages import ROW_FIELDS, SHOWN_COLUMNS, said, text_of
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Prompt, Response
from rankalign.data.templates import render
from rankalign.errors import RecordError, number_of
from rankalign.storage.jsonl import OnError, Row

EQUAL_PAIRS = "pairs of equal answers"
# A row from the better response, the worse one and the judge who says so.
Build = Callable[[Response, Response, str], dict[str, Any]]


class Dropped(RecordError):
    """A sound row that the format's own rule leaves out, such as a comparison of two equal texts.

    ``convert`` counts these under ``lost`` and goes on; to any other reader they are bad rows.
    """


@dataclass(frozen=True)
class RowFormat(ABC):
    """A format whose every row is one record: subclasses say how with :meth:`record` and :meth:`rows`.

    Columns without a place in the record wait in ``meta`` under their own names, and what is needed to lay the row out
    as it was waits in ``meta[name]``, so that reading and writing gives the row back.

    Attributes:
        judge: scores of this judge rank when writing; empty picks the only one, or the first of ``DEFAULT_JUDGES``.
        pairs: ``all`` writes every strict pair of a ranked list, ``best-worst`` one pair a list.
        ignored: columns that are left unread by wish.
    """

    judge: str = ""
    pairs: str = "all"
    ignored: Ignored = NOTHING
    name: ClassVar[str]
    id_columns: ClassVar[tuple[str, ...]] = ("id", "prompt_id")
    # Columns that were made something of although they stay in `meta` as they came, and those known to say nothing new.
    reads: ClassVar[frozenset[str]] = frozenset()
    # Whether a row without a score is refused where it has columns that nobody reads.
    strict: ClassVar[bool] = True
    # Columns with a system message for which the format has a place of its own.
    own_system: ClassVar[tuple[str, ...]] = ()
    # Whether rows hold answers as messages, calls of tools and their results among them.
    full: ClassVar[bool] = False

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from foreign rows, in order; a bad row goes to ``on_error`` and is left out."""
        ids, pending = Ids(file, self.id_columns), None
        for line, row in rows:
            check = Checker(file, line)
            try:
                record = self.take(row, check)
                _drop_equal_pair(record, check)
            except RecordError as error:
                on_error(error)
                continue
            # Neighbours alone: one record is held, not the file.
            if pending is not None and self.joins(pending, record):
                pending.responses += record.responses
                continue
            if pending is not None:
                yield pending
            record.id, record.origin = ids.take(row, line), (file, line)
            pending = record
        if pending is not None:
            yield pending

    def joins(self, pending: CandidateSet, record: CandidateSet) -> bool:
        """Whether a row's record goes on with that of the row before: more answers to the same prompt."""
        return False

    def take(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row as a record without an id: null cells are absent, a column ``system`` is the system message."""
        present, hidden = self.ignored.hide(row)
        check.nulls = frozenset(hidden.keys() - self.ignored.names)  # there, but null: not missing
        system, present = take_system(present, check, self.own_system)
        record = self.record(present, check)
        if system is not None:
            put_system(record, self.name, *system, check)
        _put_back(record, self.name, hidden)
        if not _is_scored(record) and (left := self._suspicious(record)):
            raise check.fail(", ".join(left), refusal(left, self.name))
        return record

    def _suspicious(self, record: CandidateSet) -> list[str]:
        allowed = not self.strict or self.ignored.everything
        return [] if allowed else [name for name in self.unread(record) if name not in self.ignored.names]

    def unread(self, record: CandidateSet) -> list[str]:
        """The columns of the record's row that nothing was made of and that do not just describe it."""
        note = note_of(record, self.name) or {}
        columns = {key: value for key, value in record.meta.items() if key not in FORMATS}
        return unread({**columns, **note.get("columns", {})}, {*self.reads, *SHOWN_COLUMNS})

    def own_id(self, record: CandidateSet) -> str | None:
        """The id that the record's row brought along."""
        kept = [response.meta.get(self.name) for response in record.responses[:1]]
        rows = [record.meta, *(row for row in kept if isinstance(row, dict))]
        return next((found for row in rows if (found := own_id(row, self.id_columns)) is not None), None)

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """Foreign rows from records, in order; what does not fit is counted in ``losses``."""
        for record in records:
            bare, system = without_system(record, self.name)
            for row in self.rows(bare, losses):
                yield {**row, **system}

    @abstractmethod
    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row as a record whose id is still to be given."""

    @abstractmethod
    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The rows of one record."""

    def is_pair(self, record: CandidateSet, better: str = "chosen", worse: str = "rejected") -> bool:
        """Whether the record is a pair of policies named so, with the verdict it came with, and that verdict ranks."""
        policies = [response.policy for response in record.responses]
        verdict = self.judge in ("", PREFERENCE) and record.scores(PREFERENCE) == [1, 0]
        return policies == [better, worse] and verdict and not _same(*record.responses)

    def pair_rows(
        self, record: CandidateSet, losses: Losses, build: Build, sizes: bool = False
    ) -> Iterator[dict[str, Any]]:
        """A row for each strict pair of a ranked list; the kept columns go along where there is but one.

        ``sizes`` says that rows hold the scores themselves, not only who is better.
        """
        judge = pick_judge(record, self.judge) or ""
        scores = record.scores(judge)
        pairs = []
        for first, second in strict_pairs(scores, losses, self.pairs):
            if _same(record.responses[first], record.responses[second]):
                losses.add(EQUAL_PAIRS)
            else:
                pairs.append((first, second))
        used = [record.responses[index] for index in sorted({index for pair in pairs for index in pair})]
        lost_details(used, losses, [judge], meta=False, messages=not self.full)
        if not sizes:
            lost_sizes(used, judge, losses)
        for better, worse in pairs:
            row = build(record.responses[better], record.responses[worse], judge)
            told = {key: record.meta[key] for key in said(record.meta, SHOWN_COLUMNS) if key not in row}
            yield complete(row, record, self.name, losses) if len(pairs) == 1 else {"id": record.id, **row, **told}
        rest = {key: value for key, value in record.meta.items() if key not in SHOWN_COLUMNS}
        if len(pairs) > 1 and any(value or key not in FORMATS for key, value in rest.items()):
            losses.add("meta of a prompt with several pairs")


@dataclass(frozen=True)
class PairFormat(RowFormat):
    """A format of pairs, single answers and prompts that holds messages, a ``label`` and no other score."""

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The pair or the answer as it came, or a row for each strict pair of a ranked list."""
        if self.is_pair(record):
            chosen, rejected = record.responses
            lost_details(record.responses, losses, [PREFERENCE], policy=False, meta=False, messages=not self.full)
            yield complete(self.pair_row(record, chosen, rejected), record, self.name, losses)
        elif len(record.responses) > 1:
            yield from self.pair_rows(record, losses, lambda *pair: self.pair_row(record, *pair[:2]))
        else:
            lost_details(record.responses, losses, ["label"], policy=False, meta=False, messages=not self.full)
            yield complete(self.single_row(record), record, self.name, losses)

    @abstractmethod
    def pair_row(self, record: CandidateSet, chosen: Response, rejected: Response) -> dict[str, Any]:
        """The row of two of the record's answers."""

    @abstractmethod
    def single_row(self, record: CandidateSet) -> dict[str, Any]:
        """The row of the prompt with its only answer, if it has one."""


def _is_scored(record: CandidateSet) -> bool:
    return any(score is not None for response in record.responses for score in response.scores.values())


def _put_back(record: CandidateSet, name: str, hidden: dict[str, Any]) -> None:
    """Let what was hidden from a reader wait in ``meta`` with the columns that were not read; where a model would read
    it there, apart from them."""
    for key, value in hidden.items():
        apart = key in FORMATS or (key in ROW_FIELDS and value is not None)
        place = record.meta.setdefault(name, {}).setdefault("columns", {}) if apart else record.meta
        place.setdefault(key, value)


def _same(one: Response, other: Response) -> bool:
    """Whether two responses are the same message."""
    return answer_messages(one) == answer_messages(other)


def _drop_equal_pair(record: CandidateSet, check: Checker) -> None:
    """A preference between two equal answers says nothing: it is dropped by rule."""
    if len(record.responses) == 2 and _same(*record.responses) and set(record.scores(PREFERENCE)) == {0, 1}:
        raise Dropped(check.file, check.line, "", EQUAL_PAIRS)


class Ids:
    """Gives each record of a file an id: the row's own where it has a fresh one, else ``<file stem>-<line>``.

    In a JSON list the element's number takes the place of the line's.
    """

    def __init__(self, file: str, columns: tuple[str, ...]) -> None:
        self.stem = Path(file).name.split(".")[0] or "row"
        self.columns, self.fresh = columns, FreshIds()

    def take(self, row: dict[str, Any], line: int) -> str:
        """The id of the row on ``line``."""
        named = own_id(row, self.columns)
        taken = named is None or named in self.fresh.seen
        return self.fresh.take(f"{self.stem}-{number_of(line):06d}" if taken else str(named))


def own_id(columns: dict[str, Any], names: Iterable[str]) -> str | None:
    """The id that a row brings along: the first of the columns ``names`` that holds a text or a whole number."""
    values = (columns.get(name) for name in names)
    # True is an int, and no id
    return next((str(value) for value in values if type(value) in (str, int) and str(value).strip()), None)


# --- texts and messages ------------------------------------------------------------------------------------------


def prompt_text(prompt: Prompt, losses: Losses) -> str:
    """A prompt as one string for formats that know no messages: a lone user message as it is, dialogues in HH form."""
    if isinstance(prompt, str):
        return prompt
    losses.add("prompt.messages")
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return text_of(prompt[0])
    return dialogue_text(prompt, losses)


def dialogue_text(prompt: Prompt, losses: Losses) -> str:
    """A prompt in HH form, which has no turn for the results of tools: those are left out and counted."""
    if isinstance(prompt, str):
        return render(prompt, "hh")
    spoken = [message for message in prompt if message["role"] != "tool"]
    if tools := len(prompt) - len(spoken):
        losses.add("prompt.tool", tools)
    return render(spoken, "hh") if spoken else ""


def instruction_text(instruction: str, further: str) -> str:
    """An Alpaca instruction and its input as one user turn."""
    return f"{instruction}\n\n{further}" if further else instruction
