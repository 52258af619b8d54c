"""Scores weighted by the judge's own probabilities: the expected grade over the tokens that could stand in its place.

G-Eval (Liu et al. 2023, arXiv:2303.16634, equation 1) takes sum p(s) s over the scores s of a scale. Here p is read off
the log-probabilities at the place of the grade, among the likeliest tokens that the engine gives, and shared out again
over those that are grades.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rankalign.scorers.judge_prompts import JudgePrompt
from rankalign.scorers.verdicts import Ratings

LOGPROBS = 20
"""Likeliest tokens that are asked for: as many as OpenAI's interface gives."""
SCALES = {"axes": {str(grade): float(grade) for grade in range(1, 6)}, "items": {"yes": 1.0, "no": 0.0}}
"""By output format, the grades of its scale, each of which is one token to every tokenizer that writes digits one by
one. A scale to 10 has none: its highest grade may be a token, or two of which the first is the lowest grade."""
_VALUE = {"axes": r"\d(?![\d.]*\d)", "items": r"(?:yes|no)\b"}


def expected(
    prompt: JudgePrompt, told: Sequence[Mapping[str, Any]], verdict: Ratings
) -> tuple[Ratings, Ratings] | None:
    """Expected grades, and how much probability stood on grades at all.

    Args:
        prompt: how the verdict is written; output ``axes`` or ``items``.
        told: ``{"token", "top"}`` of each token of the reply, see :class:`rankalign.engines.SamplingParams`.
        verdict: what was read of the reply.

    Returns:
        Two numbers by axis; None where the tokens do not hold the verdict in the places where it was read, each grade
        whole in one token.
    """
    text = "".join(str(entry["token"]) for entry in told)
    ends, total = [], 0
    for entry in told:
        total += len(str(entry["token"]))
        ends.append(total)
    grades, masses = Ratings(), Ratings()
    for axis, value in verdict.items():
        place = _place(text, axis, value, prompt.output)
        if place is None:
            return None
        number = next(k for k, end in enumerate(ends) if end > place[0])
        entry = told[number]
        start = place[0] - (ends[number] - len(str(entry["token"])))
        if place[1] > ends[number]:
            return None
        shares = _shares(str(entry["token"])[:start], entry["top"], prompt.output)
        masses[axis] = math.fsum(shares.values())
        if not masses[axis]:
            return None
        grades[axis] = math.fsum(value * share for value, share in shares.items()) / masses[axis]
    return grades, masses


def _place(text: str, axis: str, value: float, output: str) -> tuple[int, int] | None:
    """Where the last statement on an axis has its value, if that is the value that was read."""
    name = r"[\s*_]+".join(map(re.escape, axis.split()))
    found = list(re.finditer(rf"\b{name}\b[^\w\n]{{0,12}}?({_VALUE[output]})", text, re.IGNORECASE))
    if not found or SCALES[output].get(found[-1][1].lower()) != value:
        return None
    return found[-1].span(1)


def _shares(before: str, top: Mapping[str, float], output: str) -> dict[float, float]:
    """Probability by grade, among tokens that begin as the one written does and go on with a grade."""
    shares: dict[float, float] = {}
    for text, value in top.items():
        if before.strip() and not text.startswith(before):
            continue
        rest = text[len(before) :] if before.strip() else text
        # What may stand behind a grade in one token, a comma say, makes it no other grade.
        grade = re.fullmatch(rf"\s*({_VALUE[output]})\W*", rest, re.IGNORECASE)
        if grade and (worth := SCALES[output].get(grade[1].lower())) is not None:
            shares[worth] = shares.get(worth, 0.0) + math.exp(value)
    return shares
