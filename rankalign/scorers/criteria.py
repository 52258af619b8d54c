"""Rubrics and checklists of a record: what they may look like, what a judge is asked by them, and what they add up to.

They stand in the record's ``meta``: a list whose entries are a text or ``{"criterion": text, "weight": number}``
(``points`` for ``weight`` is HealthBench's word). The judge answers each criterion by its label, C1 or Q1; weights are
never shown to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankalign.data.messages import decoded
from rankalign.data.records import CandidateSet, refusal
from rankalign.errors import InputError
from rankalign.scorers.hardening import harden
from rankalign.scorers.judge_prompts import JudgePrompt
from rankalign.scorers.verdicts import spoken
from rankalign.storage.jsonl import HALF_A_PAIR, kind, loads

MOST = 50
"""Criteria of one record."""
KEYS = ("criterion", "weight", "points", "tags", "name")
LABELS = {"rubric": "C", "checklist": "Q"}
FIELDS = {"rubric": "rubric", "checklist": "checklist", "reference": "reference"}
"""Key of a record's ``meta`` that a mode reads where no other is named."""


@dataclass(frozen=True)
class Criterion:
    """One thing to look at in an answer, and how much it counts."""

    text: str
    weight: float = 1.0


def read_criteria(value: Any, mode: str) -> list[Criterion]:
    """A rubric or a checklist as data have it.

    Args:
        value: a list, or its JSON text, as tables keep it.
        mode: ``rubric``: every weight above 0; ``checklist``: not 0, and one above 0 (what must not be there has a
            weight below 0).

    Raises:
        InputError: the sentence says what is wrong and in which entry.
    """
    entries = decoded(value)
    if not isinstance(entries, list):
        raise InputError(f"expected a list of criteria, found {kind(entries)}")
    if not 0 < len(entries) <= MOST:
        raise InputError(f"expected 1 to {MOST} criteria, found {len(entries)}")
    found = [_criterion(entry, f"[{number}]") for number, entry in enumerate(entries)]
    texts = [each.text for each in found]
    if twice := next((text for text in texts if texts.count(text) > 1), ""):
        raise InputError(f"the criterion {twice[:60]!r} stands twice")
    for number, each in enumerate(found):
        if each.weight == 0 or (mode == "rubric" and each.weight < 0):
            least = "above 0" if mode == "rubric" else "other than 0"
            raise InputError(f"[{number}]: weight: expected a number {least}, found {each.weight:g}")
    if not any(each.weight > 0 for each in found):
        raise InputError("no criterion has a weight above 0: nothing could be earned")
    return found


def _criterion(entry: Any, where: str) -> Criterion:
    if isinstance(entry, str):
        entry = {"criterion": entry}
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected a text or an object with `criterion`, found {kind(entry)}")
    if unknown := [key for key in entry if key not in KEYS]:
        raise InputError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(KEYS)})")
    text = entry.get("criterion")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: criterion: expected a text that is not empty")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise InputError(f"{where}: criterion: {HALF_A_PAIR}")
    if "weight" in entry and "points" in entry:
        raise InputError(f"{where}: weight and points mean the same; keep one")
    weight = entry.get("weight", entry.get("points", 1.0))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"{where}: weight: expected a finite number, found {weight!r}")
    return Criterion(text, float(weight))


def criteria_of(record: CandidateSet, field: str, mode: str) -> list[Criterion]:
    """The criteria of a record.

    Raises:
        RecordError: it has none, or they are malformed; the message names record and entry.
    """
    if record.meta.get(field) is None:
        raise refusal(record, f"meta.{field}", f"is missing: mode {mode} grades by it (or name a `writer`)")
    try:
        return read_criteria(record.meta[field], mode)
    except InputError as error:
        raise refusal(record, f"meta.{field}", str(error)) from None


def reference_of(record: CandidateSet, field: str) -> str:
    """The reference answer of a record: a text, or the first of a list of texts (FastChat's).

    Raises:
        RecordError: it has none.
    """
    value = record.meta.get(field)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if value is None else "expected a text that is not empty"
        raise refusal(record, f"meta.{field}", f"{what}: the judge's prompt shows a reference answer")
    return value


def asked_by(prompt: JudgePrompt, criteria: Sequence[Criterion], mode: str, hardened: bool) -> JudgePrompt:
    """The prompt with a record's criteria in the place of its axes, a line each.

    They come with the data or from a model that read the request, so what imitates a verdict in them is broken, too.
    """
    texts = [" ".join(each.text.split()) for each in criteria]
    shown = [harden(text)[0] for text in texts] if hardened else texts
    return replace(prompt, axes={f"{LABELS[mode]}{k}": text for k, text in enumerate(shown, start=1)})


def worth(ratings: Mapping[str, float], criteria: Sequence[Criterion], mode: str) -> float:
    """What a verdict adds up to.

    Rubric: the mean of the grades by weight, from 1 to 5. Checklist: weights of what is met over the sum of those above
    0, the share of yes where all weigh alike (HealthBench, arXiv:2505.08775, section 2, before it clips).

    Args:
        ratings: by label, in the order of the criteria.
        criteria: with their weights.
        mode: ``rubric`` or ``checklist``.
    """
    earned = math.fsum(each.weight * value for each, value in zip(criteria, ratings.values(), strict=True))
    most = math.fsum(each.weight for each in criteria if each.weight > 0)
    return earned / most


# --- written by a model ------------------------------------------------------------------------------------------

WRITER = (
    "You write criteria by which others will grade answers to a request. You see the request alone. Good criteria say "
    "what this request asks for, name facts an answer must get right and faults it may fall into, and can each be "
    "decided by reading an answer. They overlap as little as possible."
)
WRITE = {
    "rubric": "Write {least} to {most} criteria for answers to this request. Each will be graded from 1 to 5; its "
    "weight, a whole number from 1 to 10, says how much it matters.",
    "checklist": "Write {least} to {most} questions about answers to this request, each to be answered by yes or no, "
    "where yes is good. The weight of each, a whole number from 1 to 10, says how much it matters.",
}
WRITTEN = (
    "End with a JSON list and nothing behind it:\n"
    '[{"criterion": "...", "weight": 3}, {"criterion": "...", "weight": 1}]'
)
AGAIN = "That could not be used: {reason}. Write the JSON list again, and nothing else."
FEWEST_WRITTEN, MOST_WRITTEN = 3, 8


def writing(mode: str, question: str) -> str:
    """The request to write criteria for a question."""
    told = WRITE[mode].format(least=FEWEST_WRITTEN, most=MOST_WRITTEN)
    return f"{told}\n\nRequest:\n{question}\n\n{WRITTEN}"


def read_written(text: str, mode: str) -> list[dict[str, Any]]:
    """The criteria at the end of what a model wrote, in the form that records keep.

    Raises:
        InputError: there is no list at its end, or it is no rubric.
    """
    said = (spoken(text) or "").rstrip().removesuffix("```").rstrip()
    starts = [match.start() for match in re.finditer(r"\[\s*[{\"]", said)] if said.endswith("]") else []
    for start in starts:
        try:
            entries = loads(said[start:])
        except ValueError:
            continue
        found = read_criteria(entries, mode)
        if any(each.weight < 0 for each in found):
            raise InputError("a weight is below 0")
        return [{"criterion": each.text, "weight": each.weight} for each in found]
    raise InputError("no JSON list stands at its end")
