"""Rated tables as people keep them: one answer a row, or all answers of a prompt in one row, told what each column is.

``--columns prompt=question,response=answer,score=stars`` says it (:func:`parse_columns`); without it the usual names
are taken, and said. It is also how our own records become a sheet: a row an answer, and everything that a record holds
in a column of its own, so that reading the sheet gives the record back.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Ids, RowFormat
from rankalign.data.formats.spreadsheet import number_of, text_of
from rankalign.data.records import CandidateSet, Checker, Prompt, Response
from rankalign.errors import InputError, RecordError
from rankalign.registry import did_you_mean
from rankalign.storage.jsonl import OnError, Row, dumps, loads

SCORE = "score"
"""Name of the judge where the table calls its scores nothing in particular."""

# What columns are called that hold one of these, in lower case and with underscores.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "user_prompt"),
    "response": ("response", "answer", "completion", "output", "reply", "generation", "text"),
    "score": ("score", "rating", "reward", "stars", "grade"),
    "policy": ("policy", "model", "generator", "model_name"),
    "judge": ("judge", "annotator", "rater", "reviewer"),
    "id": ("id", "prompt_id", "question_id"),
    "system": ("system", "system_prompt"),
}
_OWN = ("id", "prompt", "policy", "text", "finished")
_PREFIXES = ("score:", "sampling.", "meta.", "response.meta.")
_NO_SCORE = {"", "na", "n/a", "nan", "none"}  # as pandas and R write a missing number


@dataclass(frozen=True)
class Layout:
    """What each column of a table is.

    Attributes:
        prompt: the column of the prompt.
        responses: the answers' columns: one where each answer has a row, several where a prompt has one.
        scores: columns by judge, one an answer column.
        policies: columns with who answered, one an answer column; empty: the answers' columns are called as they are.
        judge: long tables: the column with who scored, in the place of a judge's name.
        id: the column with the prompt's id.
        system: the column with the system message.
        meta: columns to keep in ``meta``.
        own: whether this is a sheet of records that we wrote.
    """

    prompt: str = ""
    responses: tuple[str, ...] = ()
    scores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    judge: str = ""
    id: str = ""
    system: str = ""
    meta: tuple[str, ...] = ()
    wide: bool = False
    own: bool = False

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are read."""
        scores = (name for names in self.scores.values() for name in names)
        single = (self.prompt, self.judge, self.id, self.system)
        return tuple(filter(None, (*single, *self.responses, *scores, *self.policies, *self.meta)))


def parse_columns(text: str) -> Layout:
    """What ``--columns`` says.

    ``prompt=``, ``id=``, ``system=``, ``judge=`` name a column; ``response=``, ``policy=`` and ``score=`` (or
    ``score:JUDGE=``) one each where every answer has a row; ``responses=A|B|C``, ``policies=`` and ``scores=`` (or
    ``scores:JUDGE=``) as many as there are answers in a row; ``meta=A|B`` what is to be kept. A name with a comma in it
    goes into double quotes together with its key: ``"prompt=What, then?"``.

    Raises:
        InputError: an unknown key, one that stands twice, or numbers of columns that do not match.
    """
    given: dict[str, tuple[str, ...]] = {}
    for part in next(csv.reader([text], skipinitialspace=True), []):
        key, equals, value = (word.strip() for word in part.partition("="))
        names = tuple(name.strip() for name in value.split("|"))
        kind, _, judge = key.partition(":")
        single = _SINGULAR.get(kind, kind)
        if not equals or "" in names or single not in (*NAMES, "meta") or (judge and single != "score"):
            known = did_you_mean(kind, [*NAMES, *_SINGULAR, "meta"])
            raise InputError(f"--columns: cannot read {part!r}; write KEY=COLUMN with commas between{known}")
        full = f"score:{judge or SCORE}" if single == "score" else single
        if full in given or (len(names) > 1 and single in ("prompt", "id", "system", "judge")):
            raise InputError(f"--columns: {key} names one column, and stands once")
        given[full] = names
        given |= {"wide": ()} if kind in _SINGULAR else {}
    return _laid_out(given)


_SINGULAR = {"responses": "response", "scores": "score", "policies": "policy"}


def _laid_out(given: dict[str, tuple[str, ...]]) -> Layout:
    if "prompt" not in given:
        raise InputError("--columns: name the prompt's column with prompt=COLUMN")
    responses = given.get("response", ())
    scores = {key.removeprefix("score:"): names for key, names in given.items() if key.startswith("score:")}
    policies = given.get("policy", ())
    for what, names in {
        **{f"scores of {judge}": names for judge, names in scores.items()},
        "policies": policies,
    }.items():
        if names and len(names) != len(responses):
            raise InputError(f"--columns: {len(names)} columns of {what} for {len(responses)} of answers")
    one = {key: given.get(key, ("",))[0] for key in ("prompt", "judge", "id", "system")}
    wide = "wide" in given or len(responses) > 1
    if one["judge"] and (wide or set(scores) != {SCORE}):
        raise InputError("--columns: judge= says who gave score=, in tables with one answer a row")
    return Layout(responses=responses, scores=scores, policies=policies, meta=given.get("meta", ()), wide=wide, **one)


def recognise(columns: Iterable[str]) -> Layout:
    """What columns are by their usual names; what is not found stays empty.

    Raises:
        InputError: two columns could be the prompt, the answer, who answered, ...
    """
    names = list(columns)
    own = set(_OWN) <= set(names)
    found: dict[str, str] = {}
    for role, usual in NAMES.items():
        fits = [name for name in names if name.strip().lower().replace(" ", "_") in usual]
        if own and role in ("id", "prompt", "policy"):
            fits = [role]
        elif own:
            fits = ["text"] if role == "response" else []
        if len(fits) > 1:
            raise InputError(
                f"the columns {' and '.join(map(repr, fits))} could both be the {role}; say with --columns"
            )
        found[role] = fits[0] if fits else ""
    score, response, policy = (found.pop(role) for role in ("score", "response", "policy"))
    scores = {name.removeprefix("score:"): (name,) for name in names if name.startswith("score:")}
    scores |= {SCORE: (score,)} if score else {}
    found["judge"] = found["judge"] if list(scores) == [SCORE] else ""
    return Layout(
        responses=(response,) if response else (), scores=scores, policies=(policy,) if policy else (), own=own, **found
    )


def fits(columns: Iterable[str]) -> bool:
    """Whether the usual names of a prompt and an answer are among the columns, and nothing that other formats read."""
    names = list(columns)
    try:
        layout = recognise(names)
    except InputError:
        return False
    return bool(layout.prompt and layout.responses) and not {"chosen", "rejected", "input"} & {n.lower() for n in names}


@dataclass(frozen=True)
class Table(RowFormat):
    """Rows of one prompt become one record, in the order of their first rows; answers keep their order.

    Attributes:
        layout: what each column is; None tells it by the usual names.
        ignore: columns that may stay unread, or ``all``; they are kept in ``meta``.
    """

    layout: Layout | None = None
    ignore: frozenset[str] = frozenset()
    name = "table"

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records from the rows of a table; a bad row goes to ``on_error`` and is left out."""
        held = list(rows)
        columns = list(dict.fromkeys(name for _, row in held for name in row))
        layout = self._layout(columns, file)
        groups = _Groups(file, layout, by_id=bool(layout.id) and (layout.own or self.layout is not None))
        unread = self._unread(layout, columns)
        for line, row in held:
            check = Checker(file, line)
            try:
                _check_unread(check, row, [name for name in unread if row.get(name) is not None])
                groups.add(check, row, _read_row(check, row, layout))
            except RecordError as error:
                on_error(error)
        yield from groups.records()

    def _layout(self, columns: list[str], file: str) -> Layout:
        ignored = [name for name in columns if name in self.ignore or "all" in self.ignore]
        if self.layout is None:
            found = recognise(columns)
            rest = [name for name in ignored if name not in found.used]
            if not found.own and found.prompt and found.responses:
                print(f"{file}: {_told(found)} (another reading: --columns)", file=sys.stderr)
            return replace(found, meta=tuple(rest))
        for name in self.layout.used:
            if name not in columns:
                raise InputError(f"{file}: no column {name!r} (columns: {', '.join(columns)})")
        rest = [name for name in ignored if name not in self.layout.used]
        return replace(self.layout, meta=(*self.layout.meta, *rest))

    def _unread(self, layout: Layout, columns: list[str]) -> list[str]:
        known = {*layout.used, *(("finished", "count", "tokens") if layout.own else ())}
        prefixed = _PREFIXES if layout.own else ("score:",)
        return [name for name in columns if name not in known and not name.startswith(prefixed)]

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row as a record of its own."""
        errors: list[RecordError] = []
        found = list(self.read([(check.line, row)], check.file, errors.append))
        if errors:
            raise errors[0]
        return found[0]

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """A row an answer with all that the record holds; one with empty cells for a prompt without answers."""
        for row in flat_rows(record):
            yield {key: _written(key, value) for key, value in row.items()}


def _told(layout: Layout) -> str:
    """What was taken for what, for people."""
    parts = [f"prompt from {layout.prompt!r}", f"answers from {', '.join(map(repr, layout.responses))}"]
    parts += [f"scores from {', '.join(map(repr, names))}" for names in layout.scores.values()]
    named = {"policy": layout.policies[0] if layout.policies else "", "who scored": layout.judge}
    named |= {"id": layout.id, "system message": layout.system}
    return ", ".join(parts + [f"{what} from {name!r}" for what, name in named.items() if name])


def _check_unread(check: Checker, row: dict[str, Any], unread: list[str]) -> None:
    if unread:
        keep = "|".join(unread)
        raise check.fail(
            ", ".join(unread),
            f"is read as nothing: say with --columns what it is (meta={keep} keeps it), or go on with --ignore_columns",
        )


# --- reading a row -----------------------------------------------------------------------------------------------


@dataclass
class _Read:
    """One row: a prompt, the column values of its id, and its answers."""

    prompt: Prompt
    ident: str
    responses: list[Response]
    meta: dict[str, Any]


def _read_row(check: Checker, row: dict[str, Any], layout: Layout) -> _Read:
    prompt = _prompt(check, row, layout)
    ident = _text(check, row, layout.id) if layout.id else ""
    if layout.own:
        return _Read(prompt, ident, _own_response(check, row, layout), _prefixed(row, "meta."))
    answers = [
        answer
        for index, name in enumerate(layout.responses)
        if (answer := _response(check, row, layout, index, name)) is not None
    ]
    return _Read(prompt, ident, answers, {name: row[name] for name in layout.meta if row.get(name) is not None})


def _prompt(check: Checker, row: dict[str, Any], layout: Layout) -> Prompt:
    if not layout.prompt:
        names = ", ".join(map(str, row)) or "none"
        raise check.fail("prompt", f"no column is called so; name one with --columns prompt=COLUMN (columns: {names})")
    cell = row.get(layout.prompt)
    if cell is None:
        raise check.fail(layout.prompt, "is empty; where cells were merged, write the prompt into each row")
    value = cell if isinstance(cell, list) else _read_prompt(_text(check, row, layout.prompt))
    prompt = check.prompt(value, layout.prompt)
    if not (system := _text(check, row, layout.system) if layout.system else ""):
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *turns]


def _read_prompt(cell: str) -> Prompt:
    """A prompt from its cell: messages stand there as JSON, and so does a text that would be taken for JSON."""
    if cell.lstrip()[:1] not in ('"', "["):
        return cell
    try:
        value = loads(cell)
    except ValueError:
        return cell
    if isinstance(value, list):
        return value if value and all(isinstance(m, dict) and "role" in m for m in value) else cell
    return value if isinstance(value, str) and _read_prompt(value) != value else cell


def _text(check: Checker, row: dict[str, Any], name: str) -> str:
    """A cell as text; empty where it is."""
    cell = row.get(name)
    if cell is None:
        return ""
    if isinstance(cell, date | time):
        reason = "is a date; a spreadsheet makes dates of texts such as 3-4: format the column as text, enter it anew"
        raise check.fail(name, reason)
    if isinstance(cell, list | dict):
        raise check.fail(name, "expected a text, found a list or an object")
    return check.text(text_of(cell), name)


def _response(check: Checker, row: dict[str, Any], layout: Layout, index: int, name: str) -> Response | None:
    """The answer in column ``name``; None where the cell and all that belongs to it are empty."""
    scores = {judge: _score(check, row, names[index]) for judge, names in layout.scores.items()}
    scores = {judge: score for judge, score in scores.items() if score is not _ABSENT}
    if row.get(name) is None:
        if scores:
            raise check.fail(name, "is empty, though it has a score")
        if not layout.wide and layout.policies and row.get(layout.policies[index]) is not None:
            raise check.fail(name, f"is empty, though {layout.policies[index]!r} says who answered")
        return None
    policy = _text(check, row, layout.policies[index]) if layout.policies else name if layout.wide else ""
    if layout.judge and scores:
        if not (judge := _text(check, row, layout.judge).strip()):
            raise check.fail(layout.judge, "is empty, though there is a score")
        scores = {judge: scores[SCORE]}
    return Response(_text(check, row, name), policy or "unknown", scores=scores)


_ABSENT: Any = object()


def _score(check: Checker, row: dict[str, Any], name: str) -> Any:
    """A number, None where the cell says ``null``, and ``_ABSENT`` where it is empty or says that there is none."""
    cell = row.get(name)
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in _NO_SCORE):
        return _ABSENT
    if isinstance(cell, str):
        if cell.strip() == "null":
            return None
        if (number := number_of(cell.strip())) is None:
            raise check.fail(name, f"expected a number such as 4.5, found {cell[:40]!r}")
        cell = number
    return check.number(cell, name)


def _own_response(check: Checker, row: dict[str, Any], layout: Layout) -> list[Response]:
    """The answer of a row that we wrote."""
    if row.get("finished") is None:
        answer = _response(check, row, layout, 0, "text")
        return [answer] if answer else []
    finished = _decoded(row["finished"])
    if isinstance(finished, str):
        finished = {"true": True, "false": False}.get(finished.lower(), finished)
    if not isinstance(finished, bool):
        raise check.fail("finished", f"expected true or false, found {finished!r}")
    scores = {judge: _score(check, row, names[0]) for judge, names in layout.scores.items()}
    response = Response(
        _text(check, row, "text"),
        _text(check, row, "policy") or "unknown",
        finished,
        scores={judge: score for judge, score in scores.items() if score is not _ABSENT},
        sampling=_prefixed(row, "sampling."),
        meta=_prefixed(row, "response.meta."),
    )
    if (count := _decoded(row.get("count"))) is not None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise check.fail("count", "expected a whole number of at least 1")
        response.count = count
    if row.get("tokens") is not None:
        response.tokens = check.mapping(_decoded(row["tokens"]), "tokens")
    return [response]


def _prefixed(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): _decoded(v) for k, v in row.items() if k.startswith(prefix) and v is not None}


def _decoded(cell: Any) -> Any:
    """What :func:`_encoded` wrote."""
    if not isinstance(cell, str):
        return cell
    try:
        return loads(cell)
    except ValueError:
        return cell


# --- putting rows together ---------------------------------------------------------------------------------------


@dataclass
class _Group:
    """The rows of one prompt."""

    line: int
    prompt: Prompt
    rows: list[_Read]


class _Groups:
    """Rows by prompt, or by id where the ids are known to be those of prompts."""

    def __init__(self, file: str, layout: Layout, by_id: bool) -> None:
        self.file, self.layout, self.by_id = file, layout, by_id
        self.groups: dict[str, _Group] = {}

    def add(self, check: Checker, row: dict[str, Any], read: _Read) -> None:
        """Take one row.

        Raises:
            RecordError: another prompt has its id, or it scores an answer a second time in one judge's name.
        """
        key = f"id {read.ident}" if self.by_id and read.ident else f"prompt {dumps(read.prompt)}"
        group = self.groups.setdefault(key, _Group(check.line, read.prompt, []))
        if group.prompt != read.prompt:
            raise check.fail(self.layout.prompt, f"is another than in line {group.line}, which has the same id")
        if self.layout.own and group.rows and (not read.responses or not group.rows[0].responses):
            raise check.fail(self.layout.id, f"stands already on line {group.line}")
        if self.layout.judge:
            _merge_judges(check, group, read, self.layout.judge)
        group.rows.append(read)

    def records(self) -> Iterator[CandidateSet]:
        """A record a prompt."""
        ids = Ids(self.file, ("id",))
        of_prompts = self.by_id or self._ids_are_of_prompts()
        shared = self._shared_meta()
        if not of_prompts:
            where = f"{self.layout.id!r} tells rows apart, not prompts"
            print(f"{self.file}: {where}: it is kept in meta of the answers", file=sys.stderr)
        for group in self.groups.values():
            first = group.rows[0]
            ident = ids.take({"id": first.ident} if of_prompts and first.ident else {}, group.line)
            for row in group.rows:
                own = {name: value for name, value in row.meta.items() if name not in shared}
                own |= {self.layout.id: row.ident} if not of_prompts and row.ident else {}
                for response in row.responses:
                    response.meta |= own
            meta = {name: value for name, value in first.meta.items() if name in shared}
            yield CandidateSet(ident, group.prompt, [r for row in group.rows for r in row.responses], meta)

    def _ids_are_of_prompts(self) -> bool:
        ids = [{row.ident for row in group.rows} for group in self.groups.values()]
        return all(len(each) == 1 for each in ids) and len(set().union(*ids)) == len(ids) if self.layout.id else True

    def _shared_meta(self) -> set[str]:
        """The kept columns that are one value a prompt: they say something of the prompt, the others of the answers."""
        if self.layout.own or self.layout.wide:
            return {name for group in self.groups.values() for row in group.rows for name in row.meta}
        shared = set(self.layout.meta)
        for group in self.groups.values():
            shared -= {n for n in shared if any(row.meta.get(n) != group.rows[0].meta.get(n) for row in group.rows)}
        return shared


def _merge_judges(check: Checker, group: _Group, read: _Read, column: str) -> None:
    """Put the score of a further judge to the answer that it is for, in the place of the row's own answer."""
    known = {(response.policy, response.text): response for row in group.rows for response in row.responses}
    for response in list(read.responses):
        if earlier := known.get((response.policy, response.text)):
            if twice := set(earlier.scores) & set(response.scores):
                raise check.fail(column, f"{', '.join(sorted(twice))} has scored this answer already")
            earlier.scores |= response.scores
            read.responses.remove(response)


# --- writing -----------------------------------------------------------------------------------------------------


def flat_rows(record: CandidateSet) -> Iterator[dict[str, Any]]:
    """A record as rows: one an answer, one alone for a prompt without answers. What is not there has no key.

    ``id, prompt, policy, text, finished``, then ``count``, ``score:JUDGE``, ``sampling.NAME``, ``tokens``,
    ``response.meta.NAME`` and ``meta.NAME``.
    """
    meta = {f"meta.{name}": value for name, value in record.meta.items()}
    first = {"id": record.id, "prompt": record.prompt}
    if not record.responses:
        yield {**first, **dict.fromkeys(("policy", "text", "finished")), **meta}
    for response in record.responses:
        row = {**first, "policy": response.policy, "text": response.text, "finished": response.finished}
        row |= {"count": response.count} if response.count != 1 else {}
        row |= {f"score:{judge}": score for judge, score in response.scores.items()}
        row |= {f"sampling.{name}": value for name, value in response.sampling.items()}
        row |= {"tokens": response.tokens} if response.tokens else {}
        row |= {f"response.meta.{name}": value for name, value in response.meta.items()}
        yield {**row, **meta}


def _written(key: str, value: Any) -> Any:
    if key == "prompt":
        return dumps(value) if isinstance(value, list) or _read_prompt(value) != value else value
    if key.startswith("score:"):
        return "null" if value is None else value
    return _encoded(value) if key.startswith(_PREFIXES) else value


def _encoded(value: Any) -> Any:
    """A value of ``meta`` or ``sampling`` in a cell: JSON where it is no text, or a text that JSON could be."""
    if isinstance(value, bool | int | float):
        return value
    if not isinstance(value, str):
        return dumps(value)
    return dumps(value) if not value or _decoded(value) != value else value


def plain_prompt(prompt: Prompt) -> str:
    """A prompt as one text: messages as JSON."""
    return prompt if isinstance(prompt, str) else dumps(prompt)


def checked_names(names: Sequence[str]) -> frozenset[str]:
    """The columns that ``--ignore_columns`` names."""
    return frozenset(filter(None, (name.strip() for name in names)))


FORMAT = Table()
