"""The record: one prompt with its candidate responses. The only thing that stages exchange, one JSON line each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.errors import InputError, RecordError, on_line
from rankalign.storage.jsonl import HALF_A_PAIR, OnError, give_up, kind, write_rows
from rankalign.storage.sources import rows_of
from rankalign.storage.spreadsheet import check_lines

Message = dict[str, Any]
Prompt = str | list[Message]

# The judge of a verdict between two answers that came with the data: 1 for the better, 0 for the worse, a half each.
PREFERENCE = "preference"
ROLES = ("system", "user", "assistant", "tool")
# What tells a model something beside a message's content, by the names that data sets and servers give it.
MESSAGE_FIELDS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "tool_plan",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
    "documents",
    "citations",
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
)
# The same of a whole row: columns that change what a model reads, wherever a template has a place for them.
ROW_FIELDS = ("tools", "functions", "chat_template_kwargs", "documents", "image", "images", "audios", "videos")
# By these a message says that nobody should learn it.
MUTED: tuple[tuple[str, int | bool], ...] = (("weight", 0), ("train", False), ("training", False))
# Also as JSON spells it: tables often keep tools and arguments as text.
NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})
UNUSED = "has a meaning that is not used yet; take it out of the row, or leave such rows out with --skip_invalid"


@dataclass(slots=True)
class Response:
    """One candidate answer.

    Attributes:
        text: the answer, special tokens removed.
        policy: who wrote it; a model's name, or one such as ``human`` for answers that came with the data.
        finished: False when the token limit cut it; such an answer gets no end-of-sequence token in training.
        count: how often this very text was drawn (identical texts of one policy are merged).
        sampling: how it was drawn (temperature, seed, ...).
        scores: score by judge, higher is better; None where a judge gave none.
        tokens: ``{"tokenizer": fingerprint, "ids": [...]}`` as sampled, so that training sees the same tokens;
            ``"end"`` beside them is the token that ended it, where there is more than one such token.
        meta: anything else, kept as it came.
    """

    text: str
    policy: str = "unknown"
    finished: bool = True
    count: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float | None] = field(default_factory=dict)
    tokens: dict[str, Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class CandidateSet:
    """One prompt and its N candidates; ``id`` is unique in a file.

    ``origin`` is file and line where it was read from one: what refuses it later can still name its place.
    """

    id: str
    prompt: Prompt
    responses: list[Response] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    origin: tuple[str, int] | None = field(default=None, compare=False, repr=False)

    def scores(self, judge: str) -> list[float | None]:
        """Scores by ``judge`` in the order of the responses; None where missing."""
        return [response.scores.get(judge) for response in self.responses]


LARGEST_SCORE = 1e100  # a million squares of it still fit in a double, which ends at 1.8e308


def score_of(record: CandidateSet, response: Response, judge: str) -> float | None:
    """The score to calculate with, None where missing; ranking alone takes any finite score.

    Raises:
        InputError: naming record and judge: sums and squares of so large a score would overflow.
    """
    score = response.scores.get(judge)
    if score is not None and abs(score) > LARGEST_SCORE:
        raise InputError(
            f"record {record.id!r}: the score {score:g} by judge {judge!r} is beyond {LARGEST_SCORE:g}, where sums and "
            "squares overflow; rescale this judge's scores or take the record out"
        )
    return score


def judges(sets: Iterable[CandidateSet]) -> list[str]:
    """Names of all judges that scored at least one response, in order of first sight."""
    return list(dict.fromkeys(name for s in sets for r in s.responses for name, v in r.scores.items() if v is not None))


def refusal(record: CandidateSet, path: str, reason: str) -> RecordError:
    """The error for field ``path`` of a record that is read already; names its file and line where they are known."""
    file, line = record.origin or ("<memory>", 0)
    return RecordError(file, line, path, f"record {record.id!r}: {reason}")


def unused(record: CandidateSet) -> list[str]:
    """Paths of all that the record says to a model beside roles and contents, which no stage passes on yet.

    ``tool_calls``, ``reasoning_content``, ``tools``, ``images`` and the like (:data:`MESSAGE_FIELDS`,
    :data:`ROW_FIELDS`); null and empty values say nothing.
    """
    found = [f"meta.{key}" for key in _said(record.meta, ROW_FIELDS)]
    if not isinstance(record.prompt, str):
        for index, message in enumerate(record.prompt):
            found += [f"prompt[{index}].{key}" for key in _said(message, MESSAGE_FIELDS)]
    for index, response in enumerate(record.responses):
        further = response.meta.get("message")
        found += [f"responses[{index}].{key}" for key, off in MUTED if _is_off(further, key, off)]
        found += [f"responses[{index}].{key}" for key in _said(further, MESSAGE_FIELDS)]
    return found


def _is_off(holder: Any, key: str, off: int | bool) -> bool:
    return isinstance(holder, dict) and key in holder and holder[key] == off


def _said(holder: Any, names: Iterable[str]) -> list[str]:
    """Those of ``names`` under which a mapping holds something."""
    return [name for name in names if holder.get(name) not in NOTHING] if isinstance(holder, dict) else []


def by_id(sets: Iterable[CandidateSet]) -> dict[str, CandidateSet]:
    """Records by id, in order: files cannot hold an id twice, sets that were put together in memory can.

    Raises:
        InputError: two records share an id; one of them would be lost.
    """
    found: dict[str, CandidateSet] = {}
    for record in sets:
        if record.id in found:
            raise InputError(f"two records have the id {record.id!r}; give each an id of its own")
        found[record.id] = record
    return found


def choose_judge(sets: Iterable[CandidateSet], judge: str = "") -> str:
    """The judge to rank by: the one that is named, else the verdict that the data came with, else the only one.

    Raises:
        InputError: nobody scored, several did and none is named, or the named one did not.
    """
    return choose_among(judges(sets), judge)


def choose_among(names: Sequence[str], judge: str = "") -> str:
    """As :func:`choose_judge`, of the names of all judges in the data."""
    if judge and judge not in names:
        raise InputError(
            f"no response has a score by judge {judge!r} (judges in the data: {', '.join(names) or 'none'})"
        )
    if not judge and PREFERENCE in names:
        return PREFERENCE
    if not judge and len(names) != 1:
        what = f"several judges scored: {', '.join(names)}" if names else "no response has a score"
        raise InputError(f"{what}; name one with --judge" if names else f"{what}; run `rankalign score` first")
    return judge or names[0]


# --- checking ----------------------------------------------------------------------------------------------------


class Checker:
    """Checks of one row that name file, line and field in what they raise; format readers share it.

    Args:
        file: path for messages.
        line: 1-based line of the row.

    Attributes:
        nulls: columns of the row whose cell is null, where the row was handed on without them.
    """

    def __init__(self, file: str | os.PathLike[str], line: int) -> None:
        self.file, self.line, self.nulls = str(file), line, frozenset[str]()

    def fail(self, path: str, reason: str) -> RecordError:
        """The error for field ``path``, to be raised by the caller."""
        return RecordError(self.file, self.line, path, reason)

    def text(self, value: Any, path: str, empty: bool = True) -> str:
        """A string that can be written as UTF-8; with ``empty=False`` it must hold more than white space."""
        if not isinstance(value, str):
            raise self.fail(path, f"expected a string, found {kind(value)}")
        # Most texts pass by the first test, which is instant.
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise self.fail(path, HALF_A_PAIR)
        if not empty and not value.strip():
            raise self.fail(path, "is empty")
        return value

    def number(self, value: Any, path: str) -> float:
        """A finite number; booleans are not numbers here."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(path, f"expected a number, found {kind(value)}")
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number beyond a double
            finite = False
        if not finite:
            raise self.fail(path, "is not a finite number")
        return value

    def array(self, value: Any, path: str, at_least: int = 0) -> list[Any]:
        """A list of ``at_least`` elements."""
        if not isinstance(value, list):
            raise self.fail(path, f"expected a list, found {kind(value)}")
        if len(value) < at_least:
            raise self.fail(path, f"needs at least {at_least} elements, found {len(value)}")
        return value

    def mapping(self, value: Any, path: str) -> dict[str, Any]:
        """A JSON object."""
        if not isinstance(value, dict):
            raise self.fail(path, f"expected an object, found {kind(value)}")
        return value

    def need(self, row: dict[str, Any], key: str, path: str = "") -> Any:
        """``row[key]`` of the object at ``path``; a missing key is an error that lists what is there."""
        if key not in row and not path and key in self.nulls:
            return None
        if key not in row:
            found = f"found: {', '.join(map(str, row)) or 'nothing'}"
            raise self.fail(f"{path}.{key}" if path else key, f"is missing ({found})")
        return row[key]

    def prompt(self, value: Any, path: str = "prompt") -> Prompt:
        """A non-empty string, or a non-empty list of ``{"role", "content"}`` messages."""
        if isinstance(value, str):
            return self.text(value, path, empty=False)
        if not isinstance(value, list):
            raise self.fail(path, f"expected a string or a list of messages, found {kind(value)}")
        if not value:
            raise self.fail(path, "is empty")
        messages = [self.message(message, f"{path}[{index}]") for index, message in enumerate(value)]
        if not any(message["content"].strip() for message in messages):
            raise self.fail(path, "is empty")
        return messages

    def message(self, value: Any, path: str) -> Message:
        """A message: a known role, and a content that is a string or a list of text parts, which are joined.

        Further keys stay as they came: :func:`unused` names those that would vanish on the way to a model.
        """
        role = self.text(self.need(self.mapping(value, path), "role", path), f"{path}.role")
        if role not in ROLES:
            raise self.fail(f"{path}.role", f"unknown role {role!r} (one of {', '.join(ROLES)})")
        content = self.content(value, path)
        # The very object where nothing was joined.
        return value if content is value["content"] else {**value, "content": content}

    def content(self, message: dict[str, Any], path: str) -> str:
        """The text of a message; parts of another kind than ``{"type": "text", "text": ...}`` are refused by name."""
        value = message.get("content")
        if value is None and (calls := _said(message, MESSAGE_FIELDS)):
            raise self.fail(f"{path}.{calls[0]}", UNUSED)
        if not isinstance(value, list):
            return self.text(self.need(message, "content", path), f"{path}.content")
        return "".join(self._part(part, f"{path}.content[{index}]") for index, part in enumerate(value))

    def _part(self, part: Any, path: str) -> str:
        sort = self.mapping(part, path).get("type", "text")
        if sort != "text":
            raise self.fail(path, f"a part of type {sort!r}: only parts of text can be used")
        # Tables give every part all columns, null where it has none.
        if others := [key for key, held in part.items() if key not in ("type", "text") and held not in NOTHING]:
            raise self.fail(f"{path}.{others[0]}", UNUSED)
        return self.text(self.need(part, "text", path), f"{path}.text")


_SET_KEYS = {"id", "prompt", "responses", "meta"}
_RESPONSE_KEYS = {"text", "policy", "finished", "count", "sampling", "scores", "tokens", "meta"}


def parse(row: dict[str, Any], file: str | os.PathLike[str] = "<memory>", line: int = 1) -> CandidateSet:
    """One JSON object as a :class:`CandidateSet`.

    Raises:
        RecordError: naming the field; unknown keys are errors, because a misspelt one would be lost in silence.
    """
    check = Checker(file, line)
    _known(check, row, _SET_KEYS, "")
    ident = check.text(check.need(row, "id"), "id", empty=False)
    prompt = check.prompt(check.need(row, "prompt"))
    entries = check.array(_given(row, "responses", []), "responses")
    responses = [parse_response(check, entry, f"responses[{index}]") for index, entry in enumerate(entries)]
    return CandidateSet(ident, prompt, responses, check.mapping(_given(row, "meta", {}), "meta"), (str(file), line))


def _given(row: dict[str, Any], key: str, default: Any) -> Any:
    """A key's value; null, which tables and other languages write for a missing value, is none."""
    value = row.get(key)
    return default if value is None else value


def _known(check: Checker, row: dict[str, Any], keys: set[str], path: str) -> None:
    for key in row:
        if key not in keys:
            raise check.fail(
                path + key, f"unknown key (known: {', '.join(sorted(keys))}; anything else goes into meta)"
            )


def parse_response(check: Checker, row: Any, path: str) -> Response:
    """One JSON object as a :class:`Response`; ``path`` names it in errors."""
    check.mapping(row, path)
    _known(check, row, _RESPONSE_KEYS, path + ".")
    if "text" not in row:
        raise check.fail(f"{path}.text", "is missing")
    finished, count = _given(row, "finished", True), _given(row, "count", 1)
    if not isinstance(finished, bool):
        raise check.fail(f"{path}.finished", f"expected a boolean, found {kind(finished)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise check.fail(f"{path}.count", "expected a whole number of at least 1")
    scores = check.mapping(_given(row, "scores", {}), f"{path}.scores")
    return Response(
        text=check.text(row["text"], f"{path}.text"),
        policy=check.text(_given(row, "policy", "unknown"), f"{path}.policy", empty=False),
        finished=finished,
        count=count,
        sampling=check.mapping(_given(row, "sampling", {}), f"{path}.sampling"),
        scores={judge: None if v is None else check.number(v, f"{path}.scores.{judge}") for judge, v in scores.items()},
        tokens=_tokens(check, row.get("tokens"), f"{path}.tokens"),
        meta=check.mapping(_given(row, "meta", {}), f"{path}.meta"),
    )


def _tokens(check: Checker, value: Any, path: str) -> dict[str, Any] | None:
    if value is None:
        return None
    check.text(check.mapping(value, path).get("tokenizer"), f"{path}.tokenizer", empty=False)
    for index, token in enumerate(check.array(value.get("ids"), f"{path}.ids")):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise check.fail(f"{path}.ids[{index}]", "expected a token id")
    if (end := value.get("end")) is not None and (type(end) is not int or end < 0):
        raise check.fail(f"{path}.end", "expected a token id")
    return dict(value)


def read(path: str | os.PathLike[str], on_error: OnError | None = None) -> Iterator[CandidateSet]:
    """Yield the records of a file, checked at the door.

    Args:
        path: JSON Lines or one JSON list (gzip, BOM and CRLF are fine), Parquet, a folder: see
            :mod:`rankalign.storage.sources`.
        on_error: takes each bad record, which is then left out; without it the first one raises.

    Raises:
        RecordError: a record is wrong, an id stands twice, or something would go unused (see :func:`unused`).
    """
    report, seen = on_error or give_up, dict[str, int]()
    for number, row in rows_of(path, on_error):
        try:
            record = parse(row, path, number)
            if record.id in seen:
                raise RecordError(str(path), number, "id", f"{record.id!r} stands already {on_line(seen[record.id])}")
            if fields := unused(record):
                raise refusal(record, fields[0], UNUSED)
        except RecordError as error:
            report(error)
        else:
            seen[record.id] = number
            yield record


# --- writing -----------------------------------------------------------------------------------------------------


def to_dict(record: CandidateSet) -> dict[str, Any]:
    """The JSON object of a record; empty optional fields are left out."""
    row: dict[str, Any] = {"id": record.id, "prompt": record.prompt}
    row["responses"] = [response_to_dict(response) for response in record.responses]
    if record.meta:
        row["meta"] = record.meta
    return row


def response_to_dict(response: Response) -> dict[str, Any]:
    """The JSON object of one response; ``count`` 1 and empty fields are left out."""
    row: dict[str, Any] = {"text": response.text, "policy": response.policy, "finished": response.finished}
    if response.count != 1:
        row["count"] = response.count
    for key in ("sampling", "scores", "tokens", "meta"):
        if value := getattr(response, key):
            row[key] = value
    return row


def write(path: str | os.PathLike[str], records: Iterable[CandidateSet]) -> int:
    """Write records as JSON Lines, atomically; return how many.

    Raises:
        InputError: the name is that of a table.
    """
    check_lines(path)
    return write_rows(path, (to_dict(record) for record in records))
