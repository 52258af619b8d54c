"""Reviews by a judge that exist already: their texts parsed, their files read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import RecordError
from rankalign.scorers.verdicts import HIGHEST, LOWEST, Scores, parse_strict
from rankalign.storage.jsonl import OnError, read_rows

# What a three-class judge writes, as points of the first and the second answer.
CLASSES: dict[str, Scores] = {"1": (1.0, 0.0), "2": (0.0, 1.0), "3": (0.5, 0.5)}


@dataclass(frozen=True)
class Review:
    """One review of two answers.

    Attributes:
        question: id of the prompt.
        first: system shown as assistant 1.
        second: system shown as assistant 2.
        text: what the judge wrote; empty where only its verdict was kept.
        stored: points of first and second as the file has them; None where it has none.
        graded: True for two scores, False for a verdict (points 1, 0 or a half each).
    """

    question: str
    first: str
    second: str
    text: str
    stored: Scores | None
    graded: bool


# --- parsing -----------------------------------------------------------------------------------------------------

_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_TUPLE = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_BOTH = re.compile(rf"\bboth\b[^.\n]{{0,80}}?\bscores? of\s+{_NUMBER}", re.IGNORECASE)
# "Assistant 1: 8", "Assistant 1 gets a score of 8", "**Assistant 1** - 8/10"; but not the first number of a sum.
_NAMED = re.compile(
    r"assistant\s*([12])[*_]*\s*(?::|=|[-–—]|gets|receives|earns|scores|(?:gets|receives|earns)?\s*an?\s+(?:overall\s+)?score\s+of)"
    rf"[*_\s]*{_NUMBER}(?:\s*/\s*10)?(?![\w(^]|[ \t]*(?:[+=^/]|\*(?!\*)))",
    re.IGNORECASE,
)
_APART = 600  # characters between the two named scores


def parse_tolerant(text: str) -> Scores | None:
    """Two scores from the first line, or else the last ones the text states, each between 1 and 10.

    Read are ``(8, 9)``, ``Assistant 1: 8 ... Assistant 2: 9`` and ``both ... a score of 9``. The last statement counts,
    because what stands before it may quote the question or the answers.
    """
    if found := parse_strict(text):
        return found
    stated = [(m.end(), (float(m[1]), float(m[2]))) for m in _TUPLE.finditer(text)]
    stated += [(m.end(), (float(m[1]), float(m[1]))) for m in _BOTH.finditer(text)]
    last = {m[1]: (m.end(), float(m[2])) for m in _NAMED.finditer(text)}
    if len(last) == 2 and abs(last["1"][0] - last["2"][0]) <= _APART:
        stated.append((max(last["1"][0], last["2"][0]), (last["1"][1], last["2"][1])))
    usable = [item for item in stated if all(LOWEST <= score <= HIGHEST for score in item[1])]
    return max(usable)[1] if usable else None


def parse_class(text: str) -> Scores | None:
    """The verdict of a three-class judge: 1, 2 or 3 (a tie) alone on the last line."""
    lines = text.strip().split("\n")
    found = re.fullmatch(r"\W*([123])\W*", lines[-1])
    return CLASSES[found[1]] if found else None


# --- reading -----------------------------------------------------------------------------------------------------


def read_reviews(path: str | os.PathLike[str], on_error: OnError | None = None) -> list[Review]:
    """Reviews of a file in one of the known shapes, told by their keys.

    Vicuna and QLoRA: ``text`` and ``score`` (two numbers, or one of 1, 2, 3, -1) with ``question_id``; the systems are
    ``model_1`` and ``model_2``, or the answer ids where these are missing. minChatGPT: ``winner`` beside the answers by
    system, the first of which is taken as shown first.

    Args:
        path: the file.
        on_error: takes each bad row, which is then left out; without it the first one raises.

    Raises:
        RecordError: a row is in none of the shapes.
    """
    reviews = []
    for line, row in read_rows(path, on_error):
        check = Checker(path, line)
        try:
            reviews.append(_winner(check, row) if "winner" in row else _review(check, row))
        except RecordError as error:
            if on_error is None:
                raise
            on_error(error)
    return reviews


def _review(check: Checker, row: dict[str, Any]) -> Review:
    names = [row.get(f"model_{k}") or check.need(row, f"answer{k}_id") for k in (1, 2)]
    first, second = (check.text(name, f"model_{k}", empty=False) for k, name in enumerate(names, start=1))
    text = check.text(row.get("text", ""), "text")
    score = row.get("score")
    graded = isinstance(score, list) or score is None
    stored = _stored(check, score)
    return Review(str(check.need(row, "question_id")), first, second, text, stored, graded)


def _stored(check: Checker, score: Any) -> Scores | None:
    """Two numbers, a class, or -1 and null for nothing found."""
    if score is None:
        return None
    if not isinstance(score, list):
        return CLASSES.get(str(int(check.number(score, "score"))))
    if len(score) != 2:
        raise check.fail("score", f"expected two numbers, found {len(score)}")
    first, second = (float(check.number(value, f"score[{k}]")) for k, value in enumerate(score))
    return None if min(first, second) < 0 else (first, second)


def _winner(check: Checker, row: dict[str, Any]) -> Review:
    systems = [key for key in row if key != "winner"]
    if len(systems) != 2 or row["winner"] not in (*systems, "tie", None):
        raise check.fail("winner", "expected the name of one of two systems that stand beside it")
    points = {systems[0]: CLASSES["1"], systems[1]: CLASSES["2"], "tie": CLASSES["3"], None: None}[row["winner"]]
    return Review(f"line {check.line}", systems[0], systems[1], "", points, graded=False)
