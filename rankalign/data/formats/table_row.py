"""One row of a table and the answers in it, read by what its columns are; and a record as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from rankalign.data.formats.layout import SCORE, Layout
from rankalign.data.records import CandidateSet, Checker, Prompt, Response
from rankalign.storage.jsonl import dumps, loads
from rankalign.storage.spreadsheet import number_of, text_of

PREFIXES = ("score:", "sampling.", "meta.", "response.meta.")
_NO_SCORE = {"", "na", "n/a", "nan", "none"}  # as pandas and R write a missing number


@dataclass
class ReadRow:
    """One row: a prompt, the column values of its id, and its answers."""

    prompt: Prompt
    ident: str
    responses: list[Response]
    meta: dict[str, Any]


def read_row(check: Checker, row: dict[str, Any], layout: Layout) -> ReadRow:
    """A row by what its columns are.

    Raises:
        RecordError: a cell is not what its column should hold.
    """
    prompt = _prompt(check, row, layout)
    ident = _text(check, row, layout.id) if layout.id else ""
    if layout.own:
        return ReadRow(prompt, ident, _own_response(check, row, layout), _prefixed(row, "meta."))
    answers = [
        answer
        for index, name in enumerate(layout.responses)
        if (answer := _response(check, row, layout, index, name)) is not None
    ]
    return ReadRow(prompt, ident, answers, {name: row[name] for name in layout.meta if row.get(name) is not None})


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


_ABSENT: Any = object()  # None is a score that is there and says `null`


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
    if row.get("messages") is not None:
        response.messages = check.answer(_decoded(row["messages"]), "messages")
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


# --- writing -----------------------------------------------------------------------------------------------------


def flat_rows(record: CandidateSet) -> Iterator[dict[str, Any]]:
    """A record as rows: one an answer, one alone for a prompt without answers. What is not there has no key.

    ``id, prompt, policy, text, finished``, then ``count``, ``score:JUDGE``, ``sampling.NAME``, ``tokens``,
    ``response.meta.NAME`` and ``meta.NAME``.
    """
    meta = {f"meta.{name}": value for name, value in record.meta.items()}
    first: dict[str, Any] = {"id": record.id, "prompt": record.prompt}
    if not record.responses:
        yield {**first, **dict.fromkeys(("policy", "text", "finished")), **meta}
    for response in record.responses:
        row: dict[str, Any] = {**first, "policy": response.policy, "text": response.text, "finished": response.finished}
        row |= {"count": response.count} if response.count != 1 else {}
        row |= {f"score:{judge}": score for judge, score in response.scores.items()}
        row |= {f"sampling.{name}": value for name, value in response.sampling.items()}
        row |= {"messages": response.messages} if response.messages is not None else {}
        row |= {"tokens": response.tokens} if response.tokens else {}
        row |= {f"response.meta.{name}": value for name, value in response.meta.items()}
        yield {**row, **meta}


def written(key: str, value: Any) -> Any:
    """The cell for a value of :func:`flat_rows`."""
    if key == "prompt":
        return dumps(value) if isinstance(value, list) or _read_prompt(value) != value else value
    if key.startswith("score:"):
        return "null" if value is None else value
    return _encoded(value) if key.startswith(PREFIXES) or key == "messages" else value


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
