"""What waits in ``meta`` for the way back, and counts of what a row cannot hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import compress
from typing import Any

from rankalign.data.formats import FORMATS, Losses
from rankalign.data.records import PREFERENCE, CandidateSet, Response


def keep(name: str, note: dict[str, Any], row: dict[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """``meta`` of a record read from ``row``: the columns not ``used``, and the layout ``note`` under ``name``.

    A column that happens to have the name of a format goes into the note, where it cannot be taken for one.
    """
    taken = set(used)
    columns = {key: value for key, value in row.items() if key not in taken}
    homonyms = {key: columns.pop(key) for key in list(columns) if key in FORMATS}
    return {**columns, name: {**note, "columns": homonyms} if homonyms else note}


def note_of(record: CandidateSet, name: str) -> dict[str, Any] | None:
    """The layout note that format ``name`` left in the record, or None for a record from elsewhere."""
    note = record.meta.get(name)
    return note if isinstance(note, dict) else None


def complete(row: dict[str, Any], record: CandidateSet, name: str, losses: Losses) -> dict[str, Any]:
    """``row`` with the kept columns of ``record`` put back, and its id where the record comes from elsewhere."""
    note = note_of(record, name)
    kept = {key: value for key, value in record.meta.items() if key not in FORMATS}
    for key in record.meta:
        if (key in FORMATS and key != name and record.meta[key]) or (key in kept and key in row):
            losses.add(f"meta.{key}")
    kept = {"id": record.id, **kept} if note is None else {**kept, **note.get("columns", {})}
    first = {"id": kept["id"]} if "id" in kept else {}
    return {**first, **row, **{key: value for key, value in kept.items() if key not in row}}


_DETAILS = ("policy", "finished", "count", "sampling", "tokens", "meta", "messages")


def lost_details(
    responses: Iterable[Response],
    losses: Losses,
    held: Iterable[str] = (),
    policy: bool = True,
    meta: bool = True,
    messages: bool = True,
) -> None:
    """Count what a row of plain texts cannot say of its responses.

    Args:
        responses: those that are written.
        losses: takes the counts, named by the field that is lost.
        held: judges whose scores the row does hold.
        policy: whether names of policies are lost.
        meta: whether ``meta`` of a response is lost.
        messages: whether calls of tools, their results and thoughts are lost.
    """
    judges = set(held)
    for response in responses:
        lost = (
            policy and response.policy != "unknown",
            not response.finished,
            response.count != 1,
            response.sampling,
            response.tokens,
            meta and response.meta,
            messages and response.messages is not None,
        )
        if any(lost):
            for field in compress(_DETAILS, lost):
                losses.add(f"response.{field}")
        for name, score in response.scores.items():
            if score is not None and name not in judges:
                losses.add(f"scores.{name}")


def lost_sizes(
    responses: Sequence[Response], judge: str, losses: Losses, kept: Collection[str] = (PREFERENCE, "label")
) -> None:
    """Count scores of which a row keeps the order and not the size.

    Args:
        responses: those that are written.
        judge: by whose scores they are ordered.
        losses: takes the count.
        kept: judges whose scores are nothing but an order.
    """
    if responses and judge not in kept:
        losses.add(f"sizes of scores.{judge}", len(responses))
