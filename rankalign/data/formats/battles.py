"""Arena battles: two models answered one person, who said which was better.

LMSYS' ``chatbot_arena_conversations`` and its relatives hold whole conversations, ``conversation_a`` and ``_b``; its
``human_preference_55k`` holds lists of turns written as text, ``prompt``, ``response_a``, ``response_b``, and the
winner in three columns. A record has one prompt, so that battles whose models parted before the last answer are left
out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answered import answer_messages, answered
from rankalign.data.formats.common import Dropped, RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.pairs import FIRST, SECOND, TIE, worded
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Message, Response
from rankalign.data.templates import as_messages
from rankalign.storage.jsonl import dumps, loads

SIDES = ("conversation_a", "conversation_b")
TEXTS = ("prompt", "response_a", "response_b")
WINNERS = {"winner_model_a": FIRST, "winner_model_b": SECOND, "winner_tie": TIE}
SEVERAL = "battles over several turns, whose answers share no prompt"


@dataclass(frozen=True)
class Battles(RowFormat):
    """The verdict is judge ``preference``: 1 and 0, or 0.5 each for a tie of either kind; policies are the models."""

    name = "arena-battles"
    id_columns = ("id", "question_id", "prompt_id")
    reads = frozenset(
        {
            *WINNERS,
            "winner",
            "model_a",
            "model_b",
            "turn",
            "anony",
            "judge",
            "openai_moderation",
            "toxic_chat_tag",
            "is_code",
        }
    )

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of either form."""
        whole = SIDES[0] in row
        sides = self._conversations(row, check) if whole else self._turns(row, check)
        asked = [[{"role": m["role"], "content": m["content"]} for m in side[:-1]] for side in sides]
        if asked[0] != asked[1]:
            questions = [[m["content"] for m in side if m["role"] == "user"] for side in asked]
            if questions[0] != questions[1]:
                raise check.fail(SIDES[1] if whole else TEXTS[0], "asks something else than the other side")
            raise Dropped(check.file, check.line, "", SEVERAL)
        models = [check.text(check.need(row, f"model_{side}"), f"model_{side}", empty=False) for side in "ab"]
        columns = SIDES if whole else TEXTS[1:]
        scores = self._winner(row, check, models)
        responses = [
            answered(check, side[-1:], column, policy=model, scores={PREFERENCE: score})
            for side, column, model, score in zip(sides, columns, models, scores, strict=True)
        ]
        prompt = check.prompt(sides[0][:-1], columns[0])
        used = SIDES if whole else TEXTS
        note = {"whole": whole, "form": None if whole else _forms(row)}
        return CandidateSet("", prompt, responses, keep(self.name, note | {"pair": scores}, row, used))

    def _conversations(self, row: dict[str, Any], check: Checker) -> list[list[Message]]:
        sides = []
        for column in SIDES:
            messages = check.prompt(check.need(row, column), column)
            if isinstance(messages, str) or len(messages) < 2:
                raise check.fail(column, "expected a list of at least two messages")
            sides.append(messages)
        return sides

    def _turns(self, row: dict[str, Any], check: Checker) -> list[list[Message]]:
        held = {column: check.need(row, column) for column in TEXTS}
        asked, *answers = (_list(held[c], form, c, check) for c, form in zip(TEXTS, _forms(held), strict=True))
        for column, side in zip(TEXTS[1:], answers, strict=True):
            if len(side) != len(asked) or not asked:
                raise check.fail(column, f"{len(side)} answers to {len(asked)} questions")
        return [
            [
                {"role": role, "content": text}
                for pair in zip(asked, side, strict=True)
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            for side in answers
        ]

    def _winner(self, row: dict[str, Any], check: Checker, models: list[str]) -> tuple[float | None, float | None]:
        if "winner" in row:
            return worded(row["winner"], "winner", ("model_a", "model_b"), check, models)
        said = {column: check.number(check.need(row, column), column) for column in WINNERS}
        if sorted(said.values()) != [0, 0, 1]:
            raise check.fail("winner_model_a", "of the three columns of winners one must be 1 and two must be 0")
        return next(WINNERS[column] for column, value in said.items() if value == 1)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came, or a battle for each strict pair, won by model A."""
        note = note_of(record, self.name) or {}
        if len(record.responses) == 2 and record.scores(PREFERENCE) == list(note.get("pair", ())) and not self.judge:
            lost_details(record.responses, losses, [PREFERENCE], policy=False, meta=False, messages=not note["whole"])
            yield complete(self._row(record, note, *record.responses), record, self.name, losses)
            return
        yield from self.pair_rows(record, losses, lambda better, worse, _: self._won(record, better, worse))

    def _row(self, record: CandidateSet, note: dict[str, Any], one: Response, two: Response) -> dict[str, Any]:
        prompt = as_messages(record.prompt)
        if note["whole"]:
            return {column: [*prompt, *answer_messages(r)] for column, r in zip(SIDES, (one, two), strict=True)}
        asked = [m["content"] for m in prompt if m["role"] == "user"]
        earlier = [m["content"] for m in prompt if m["role"] == "assistant"]
        lists = (asked, [*earlier, one.text], [*earlier, two.text])
        written = zip(TEXTS, lists, note["form"], strict=True)
        return {column: _spelt(texts, form) for column, texts, form in written}

    def _won(self, record: CandidateSet, better: Response, worse: Response) -> dict[str, Any]:
        return {
            "model_a": better.policy,
            "model_b": worse.policy,
            "winner": "model_a",
            **self._row(record, {"whole": True}, better, worse),
        }


def _form(value: Any) -> str:
    """How turns are written: as a list, as a list in JSON (with blanks or compact), or as the text of a single one."""
    if not isinstance(value, str):
        return "list"
    try:
        found = loads(value)
    except ValueError:
        return "text"
    if not isinstance(found, list) or not found or any(isinstance(entry, list | dict) for entry in found):
        return "text"
    return "json" if dumps(found) == value else "compact"


def _forms(row: dict[str, Any]) -> list[str]:
    """The forms of question and answers: lists in JSON only where all three are, else that is what somebody wrote."""
    forms = [_form(row[column]) for column in TEXTS]
    return ["list" if form == "list" else "text" for form in forms] if "text" in forms else forms


def _spelt(texts: list[str], form: str) -> Any:
    if form == "compact":
        return json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
    return dumps(texts) if form == "json" else texts if form == "list" else texts[0]


def _list(value: Any, form: str, path: str, check: Checker) -> list[str]:
    """A list of texts, as such or written as one text; a text that is none is a single turn."""
    value = loads(value) if form in ("json", "compact") else value if form == "list" else [value]
    return [check.text(text, f"{path}[{index}]") for index, text in enumerate(check.array(value, path))]


FORMAT = Battles()
