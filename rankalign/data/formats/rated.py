"""One answer a row, with or without numbers that rate it: HelpSteer2, BeaverTails, dolly, Prometheus' feedback, ...

Consecutive rows of one prompt whose answers are rated become one record, so that a list of candidates stays a list.
Ratings are judges of their columns' names, see :data:`rankalign.data.formats.aliases.AXES`. What else a row holds waits
with its answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rankalign.data.formats import FORMATS, Losses
from rankalign.data.formats.aliases import (
    ANSWERS,
    AXES,
    ENTRY_MODELS,
    PROMPTS,
    first,
    number_in,
    prompt_of,
    respelt,
    spelling,
)
from rankalign.data.formats.answered import answered, spelt
from rankalign.data.formats.common import RowFormat, instruction_text, prompt_text
from rankalign.data.formats.kept import lost_details, note_of
from rankalign.data.formats.pairs import HELPSTEER_PAIRS
from rankalign.data.formats.ranking import pick_judge
from rankalign.data.formats.unread import unread
from rankalign.data.records import CandidateSet, Checker, Prompt, Response

CONTEXTS = ("context", "input", "document", "passage")


@dataclass(frozen=True)
class Rated(RowFormat):
    """The first column that is a prompt by name, the first that is an answer by name, and ratings."""

    name = "prompt-response"
    prompts: ClassVar[tuple[str, ...]] = PROMPTS
    answers: ClassVar[tuple[str, ...]] = ANSWERS

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        asked = first(row, self.prompts)
        answer = first({key: row[key] for key in row if key != asked}, self.answers)
        for column, names in ((asked, self.prompts), (answer, self.answers)):
            if not column:
                raise check.fail(
                    names[0], f"is missing, and so is any of {', '.join(names[1:])} (found: {', '.join(row)})"
                )
        context = first({key: row[key] for key in row if key not in (asked, answer)}, CONTEXTS)
        parts = {}
        if context and isinstance(row[asked], str) and isinstance(row[context], str):
            parts = {"instruction": row[asked], "input": row[context]}
        prompt = self.prompt(instruction_text(*parts.values()) if parts else row[asked], asked, check)
        response = answered(check, row[answer], answer)
        used = [asked, answer, *([context] if parts else [])]
        rest = {key: value for key, value in row.items() if key not in used}
        response.scores = {AXES[key]: number_in(rest[key], key, check) for key in rest if key in AXES}
        writer = first(rest, ENTRY_MODELS)
        # Beside an answer a source says where the row is from, not who answered.
        named = writer not in ("", "source") and isinstance(rest[writer], str) and rest[writer].strip()
        response.policy = rest[writer] if named else "output"
        response.meta[self.name] = rest
        note = {
            "columns_of": used,
            "text": spelling(row[asked], prompt),
            "form": isinstance(row[answer], str),
        }
        meta: dict[str, Any] = {self.name: note}
        return CandidateSet("", prompt, [response], meta | ({"alpaca": parts} if parts else {}))

    def prompt(self, value: Any, path: str, check: Checker) -> Prompt:
        """The prompt that stands in a column."""
        return prompt_of(value, path, check)

    def joins(self, pending: CandidateSet, record: CandidateSet) -> bool:
        """Whether two rows are answers to one prompt, both rated by the same judges."""
        judges = record.responses[0].scores.keys() if record.responses else ()
        same = pending.prompt == record.prompt and bool(judges) and pending.responses[0].scores.keys() == judges
        return same and all(self.name in each.meta for each in (*pending.responses, *record.responses))

    def unread(self, record: CandidateSet) -> list[str]:
        """The columns of the answers' rows that nothing was made of."""
        rows: dict[str, Any] = {}
        for response in record.responses:
            rows |= response.meta.get(self.name, {})
        return [*super().unread(record), *unread(rows, {*self.reads, *AXES})]

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """A row for each answer, with its ratings where the record comes from elsewhere."""
        note = note_of(record, self.name)
        for key, value in record.meta.items():
            if key not in (self.name, "alpaca") and (value or key not in FORMATS) and len(record.responses) > 1:
                losses.add(f"meta.{key}")
        for response in record.responses:
            kept = response.meta.get(self.name)
            if note is None or kept is None:
                yield self._foreign(record, response, losses)
                continue
            lost_details([response], losses, AXES.values(), policy=False, meta=False, messages=False)
            asked, answer, *context = note["columns_of"]
            row = {
                asked: respelt(record, note["text"]),
                answer: spelt(response, note["form"]),
            }
            further = {key: value for key, value in record.meta.items() if key not in FORMATS} | note.get("columns", {})
            yield row | ({context[0]: record.meta["alpaca"]["input"]} if context else {}) | kept | further

    def _foreign(self, record: CandidateSet, response: Response, losses: Losses) -> dict[str, Any]:
        """A row of an answer from elsewhere: its ratings under their names, any other judge that ranks as ``score``."""
        own: dict[str, float | None] = {
            axis: score for axis, score in response.scores.items() if axis in AXES.values() and score is not None
        }
        judge = pick_judge(record, self.judge) or ""
        if judge not in own and response.scores.get(judge) is not None:
            own["score"] = response.scores[judge]
        lost_details([response], losses, [*own, judge], policy=False)
        return {"id": record.id, "prompt": prompt_text(record.prompt, losses), "response": response.text, **own}


@dataclass(frozen=True)
class HelpSteer(Rated):
    """HelpSteer, HelpSteer2 and 3: five axes an answer; or two answers and the strength of a preference."""

    name = "helpsteer"
    prompts = ("prompt", "context")
    answers = ("response",)

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of either form."""
        return HELPSTEER_PAIRS.record(row, check) if HELPSTEER_PAIRS.fits(row) else super().record(row, check)

    def prompt(self, value: Any, path: str, check: Checker) -> Prompt:
        """Turns that are parted by ``<extra_id_1>`` marks become messages."""
        return prompt_of(turns_of(value) if isinstance(value, str) else value, path, check)

    def unread(self, record: CandidateSet) -> list[str]:
        """As of either form."""
        return HELPSTEER_PAIRS.unread(record) if _is_pair(record) else super().unread(record)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """As of either form."""
        yield from HELPSTEER_PAIRS.rows(record, losses) if _is_pair(record) else super().rows(record, losses)


def _is_pair(record: CandidateSet) -> bool:
    return bool((note_of(record, "helpsteer") or {}).get("policies"))


_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def turns_of(text: str) -> Any:
    """HelpSteer's dialogues as messages: the first turn is the user's, marks stand before the others."""
    pieces = _TURN.split(text)
    if len(pieces) == 1:
        return text
    messages = [{"role": "user", "content": pieces[0]}]
    for name, content in zip(pieces[1::2], pieces[2::2], strict=True):
        messages.append({"role": name.lower(), "content": content})
    # Prompts end with the mark behind which the answer is to stand.
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    return messages


@dataclass(frozen=True)
class BeaverTails(Rated):
    """BeaverTails: ``is_safe`` is judge ``safe``; the kinds of harm stay with the answer."""

    name = "beavertails"
    prompts, answers = ("prompt",), ("response",)
    reads = frozenset({"category"})


PROMPT_RESPONSE, HELPSTEER, BEAVERTAILS = Rated(), HelpSteer(), BeaverTails()
