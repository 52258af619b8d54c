"""OpenAssistant's conversations: trees of messages, a row each, in which people answered and ranked.

Each message of a person that was answered becomes a record: the prompt is the way from the tree's root to it, the
answers are its replies, and their ``rank`` (0 is best) is judge ``rank``, negated. The older export, one text with
``<human>:`` and ``<bot>:`` before the turns, is read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.common import Dropped
from rankalign.data.formats.named import TURNS_OF_TEXT
from rankalign.data.records import CandidateSet, Checker, Message, Response
from rankalign.errors import InputError, RecordError, on_line
from rankalign.storage.jsonl import OnError, Row

ROLES = {"prompter": "user", "assistant": "assistant"}
COLUMNS = ("message_id", "parent_id", "text", "role", "rank")


@dataclass
class Node:
    """A message, where it stands in the file, and the messages that answer it."""

    row: dict[str, Any]
    check: Checker
    replies: list[Node] = field(default_factory=list)


class Oasst:
    """Rows of messages become records when the whole file is read; rows of texts are records of their own."""

    def read(self, rows: Iterable[Row], file: str, on_error: OnError) -> Iterator[CandidateSet]:
        """Records: of the texts, then of the trees, in the order of the messages that ask."""
        nodes: dict[str, Node] = {}
        texts: list[Row] = []
        for line, row in rows:
            if "message_id" not in row:
                texts.append((line, row))
                continue
            check = Checker(file, line)
            try:
                nodes[_checked(row, check, nodes)] = Node(row, check)
            except RecordError as error:
                on_error(error)
        yield from TURNS_OF_TEXT.read(texts, file, on_error)
        for node in nodes.values():  # a second pass: a reply may stand before what it replies to
            if (parent := nodes.get(node.row.get("parent_id") or "")) is not None:
                parent.replies.append(node)
        for ident, node in nodes.items():
            if node.row["role"] == "prompter":
                try:
                    record = _record(ident, node, nodes)
                    record.origin = (file, node.check.line)
                    yield record
                except RecordError as error:
                    on_error(error)

    def write(self, records: Iterable[CandidateSet], losses: Losses) -> Iterator[dict[str, Any]]:
        """None: the trees are read only."""
        raise InputError("OpenAssistant's trees are read, not written; write one of the formats")


def _checked(row: dict[str, Any], check: Checker, nodes: dict[str, Node]) -> str:
    ident = check.text(row["message_id"], "message_id", empty=False)
    if ident in nodes:
        raise check.fail("message_id", f"{ident!r} stands already {on_line(nodes[ident].check.line)}")
    check.text(check.need(row, "text"), "text")
    if check.need(row, "role") not in ROLES:
        raise check.fail("role", f"expected one of {', '.join(ROLES)}, found {row['role']!r}")
    if row.get("parent_id") is not None:
        check.text(row["parent_id"], "parent_id")
    if row.get("rank") is not None:
        check.number(row["rank"], "rank")
    return ident


def _record(ident: str, node: Node, nodes: dict[str, Node]) -> CandidateSet:
    answers = [reply for reply in node.replies if reply.row["role"] == "assistant"]
    if not answers:
        raise Dropped(node.check.file, node.check.line, "", "questions without an answer")
    prompt = node.check.prompt(_way(node, nodes), "text")
    return CandidateSet(ident, prompt, [_response(reply.row) for reply in answers], _further(node.row))


def _way(node: Node, nodes: dict[str, Node]) -> list[Message]:
    """The messages from the root to this one."""
    messages: list[Message] = []
    seen = set[str]()  # damaged files have messages that answer each other in a circle
    while True:
        row = node.row
        messages.insert(0, {"role": ROLES[row["role"]], "content": row["text"]})
        if row.get("parent_id") is None:
            return messages
        seen.add(row["message_id"])
        if row["parent_id"] not in nodes or row["parent_id"] in seen:
            raise node.check.fail("parent_id", f"{row['parent_id']!r} leads to no root in this file")
        node = nodes[row["parent_id"]]


def _response(row: dict[str, Any]) -> Response:
    rank = row.get("rank")
    scores: dict[str, float | None] = {} if rank is None else {"rank": -rank}
    return Response(row["text"], policy="human", scores=scores, meta={"message_id": row["message_id"], **_further(row)})


def _further(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in COLUMNS}


FORMAT = Oasst()
