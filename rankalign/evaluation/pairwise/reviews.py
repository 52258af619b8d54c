"""Reviews by a judge that exist already: their texts parsed, their files read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError, RecordError
from rankalign.scorers.verdicts import Scores, spoken
from rankalign.storage.jsonl import OnError, read_rows

SCALE = (0.0, 10.0)
"""Judges are asked for 1 to 10; the published reviews have a 0 among them."""
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
        reviewer: who judged; empty where the file does not say.
        key: the file's own id of the review; empty where it has none.
        scale: lowest and highest score; points beyond it count as not parsed.
        named: False where first and second are ids of answers, not names of systems.
    """

    question: str
    first: str
    second: str
    text: str
    stored: Scores | None
    graded: bool
    reviewer: str = ""
    key: str = ""
    scale: Scores = SCALE
    named: bool = field(default=True, compare=False)

    def within(self, points: Scores | None) -> Scores | None:
        """``points`` where both lie on the scale."""
        low, high = self.scale
        return points if points and all(low <= value <= high for value in points) else None


# --- parsing -----------------------------------------------------------------------------------------------------

_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_TUPLE = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_BOTH = re.compile(rf"\bboth\b[^.\n]{{0,80}}?\bscores? of\s+{_NUMBER}", re.IGNORECASE)
# "Assistant 1: 8", "Assistant 1 gets a score of 8", "**Assistant 1** - 8/10"; but not the first number of a sum.
_NAMED = re.compile(
    r"assistant\s*([12])[*_]*\s*(?::|=|[-–—]|gets|receives|earns|scored?s?|(?:gets|receives|earns)?\s*an?\s+(?:overall\s+)?score\s+of)"
    rf"[*_\s]*{_NUMBER}(?:\s*/\s*10)?(?![\w(^]|[ \t]*(?:[+=^/]|\*(?!\*))"
    # A word right behind it makes it a count of something, "10 minutes", unless it goes on to the reason.
    r"|[ \t]+(?!(?:and|but|while|whereas|out|points?|because|since|as|for|vs|versus|on|due|with|assistant)\b)[a-z])",
    re.IGNORECASE,
)
# float() takes "1_0", "1e1" and "nan", too.
_PLAIN = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")
_APART = 600  # characters between the two named scores


def first_line(text: str) -> Scores | None:
    """FastChat's published rule: the first line, commas as blanks, must be exactly two numbers, on the scale or not.

    A live judge is asked for 1 to 10 and held to it; published sums count a 0, and what lies beyond is counted by name.
    """
    said = spoken(text) or ""
    fields = (said if said == text else said.lstrip()).split("\n", 1)[0].replace(",", " ").split()
    if len(fields) != 2 or not all(_PLAIN.fullmatch(field) for field in fields):
        return None
    return float(fields[0]), float(fields[1])


def parse_tolerant(text: str) -> Scores | None:
    """Two scores from the first line that is not blank, or else the last ones the text states, each from 0 to 10.

    Read are ``(8, 9)``, ``Assistant 1: 8 ... Assistant 2: 9`` and ``both ... a score of 9``. The last statement counts,
    because what stands before it may quote the question or the answers; thoughts are no statement. Two that differ
    with nothing said between them are none.
    """
    text = spoken(text) or ""
    if (found := first_line(text.lstrip())) and _on_scale(found):
        return found
    stated = [(m.end(), (float(m[1]), float(m[2]))) for m in _TUPLE.finditer(text)]
    stated += [(m.end(), (float(m[1]), float(m[1]))) for m in _BOTH.finditer(text)]
    last = {m[1]: (m.end(), float(m[2])) for m in _NAMED.finditer(text)}
    if len(last) == 2 and abs(last["1"][0] - last["2"][0]) <= _APART:
        stated.append((max(last["1"][0], last["2"][0]), (last["1"][1], last["2"][1])))
    usable = sorted(item for item in stated if _on_scale(item[1]))
    if len(usable) > 1 and usable[-1][1] != usable[-2][1] and _TUPLE.fullmatch(text[usable[-2][0] :].strip()):
        return None
    return usable[-1][1] if usable else None


def _on_scale(scores: Scores) -> bool:
    return all(SCALE[0] <= score <= SCALE[1] for score in scores)


_OUTPUT = re.compile(r"\W*output\W*([ab])\W*(?:is (?:the )?(?:better|best)(?: one)?\W*)?", re.IGNORECASE)


def parse_class(text: str) -> Scores | None:
    """A verdict alone on the last line: 1, 2 or 3 (a tie), or ``Output (a)``, ``Output (b)`` as AlpacaFarm asks for."""
    last = text.strip().split("\n")[-1]
    if found := re.fullmatch(r"\W*([123])\W*", last):
        return CLASSES[found[1]]
    found = _OUTPUT.fullmatch(last)
    return CLASSES["1" if found[1].lower() == "a" else "2"] if found else None


# --- reading -----------------------------------------------------------------------------------------------------


def read_reviews(
    path: str | os.PathLike[str], on_error: OnError | None = None, answers: Answers | None = None
) -> list[Review]:
    """Reviews of a file in one of the known shapes, told by their keys.

    Vicuna and QLoRA: ``text`` and ``score`` (two numbers, or one of 1, 2, 3, -1) with ``question_id``; the systems are
    ``model_1`` and ``model_2``, or those whose answers ``answer1_id`` and ``answer2_id`` are. minChatGPT: ``winner``
    beside the answers by system, the first of which is taken as shown first.

    Args:
        path: the file.
        on_error: takes each bad row, which is then left out; without it the first one raises.
        answers: from :func:`read_answers`; without it answer ids stand for themselves.

    Raises:
        RecordError: a row is in none of the shapes, or an answer id is not among the answers.
        InputError: rows name answers only, a new one for every question.
    """
    reviews = []
    for line, row in read_rows(path, on_error):
        check = Checker(path, line)
        try:
            reviews.append(_winner(check, row) if "winner" in row else _review(check, row, answers))
        except RecordError as error:
            if on_error is None:
                raise
            on_error(error)
    _refuse_answer_ids(path, reviews)
    return reviews


def _refuse_answer_ids(path: str | os.PathLike[str], reviews: list[Review]) -> None:
    """An id that stands for one answer would make a system of every answer."""
    loose = [review for review in reviews if not review.named]
    questions = {review.question for review in loose}
    seen = {(name, review.question) for review in loose for name in (review.first, review.second)}
    if len(questions) > 1 and len({name for name, _ in seen}) == len(seen):
        raise InputError(
            f"{path}: reviews name answers ({loose[0].first!r}, ...) and no systems; give the files of the answers "
            "with --answers, or rows with model_1 and model_2"
        )


Answers = Mapping[str, tuple[str, str]]
"""By answer id: the system that gave it, and the question."""


def read_answers(paths: Sequence[str | os.PathLike[str]]) -> dict[str, tuple[str, str]]:
    """Whose answers are whose, from FastChat's answer files: rows of ``answer_id``, ``question_id`` and ``model_id``.

    Raises:
        RecordError: a row lacks one of them, or an id stands for two answers.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        for line, row in read_rows(path):
            check = Checker(path, line)
            ident = str(check.need(row, "answer_id"))
            model = check.text(row.get("answers_of") or check.need(row, "model_id"), "model_id", empty=False)
            own = (model, str(check.need(row, "question_id")))
            if found.setdefault(ident, own) != own:
                raise check.fail("answer_id", f"{ident!r} stands for another answer already")
    return found


def _review(check: Checker, row: dict[str, Any], answers: Answers | None) -> Review:
    question = str(check.need(row, "question_id"))
    first, second = (_system(check, row, k, question, answers) for k in (1, 2))
    if first == second:
        raise check.fail("model_2", f"both answers are by {first!r}")
    text, score = check.text(row.get("text", ""), "text"), row.get("score")
    verdict = parse_tolerant(text) is None and parse_class(text) is not None  # for rows without a score of their own
    graded = isinstance(score, list) or (score is None and not verdict)
    named = answers is not None or bool(row.get("model_1") and row.get("model_2"))
    reviewer, key = (str(row.get(name) or "") for name in ("reviewer_id", "review_id"))
    return Review(
        question, first, second, text, _stored(check, score), graded, reviewer, key, _scale(check, row), named
    )


def _system(check: Checker, row: dict[str, Any], k: int, question: str, answers: Answers | None) -> str:
    """The name of the system that gave answer ``k``."""
    if name := row.get(f"model_{k}"):
        return check.text(name, f"model_{k}", empty=False)
    ident = check.text(check.need(row, f"answer{k}_id"), f"answer{k}_id", empty=False)
    if answers is None:
        return ident
    if ident not in answers:
        raise check.fail(f"answer{k}_id", f"{ident!r} is in none of the answer files")
    model, asked = answers[ident]
    if asked != question:
        raise check.fail(f"answer{k}_id", f"{ident!r} answers question {asked!r}, not {question!r}")
    return model


def _scale(check: Checker, row: dict[str, Any]) -> Scores:
    if "scale" not in row:
        return SCALE
    low, high = (float(check.number(v, "scale")) for v in check.array(row["scale"], "scale", 2)[:2])
    return low, high


def _stored(check: Checker, score: Any) -> Scores | None:
    """Two numbers, a class, or -1 and null for nothing found; whether they are on the scale is asked later."""
    if score is None:
        return None
    if not isinstance(score, list):
        return CLASSES.get(f"{check.number(score, 'score'):g}")
    if len(score) != 2:
        raise check.fail("score", f"expected two numbers, found {len(score)}")
    first, second = (float(check.number(value, f"score[{k}]")) for k, value in enumerate(score))
    return None if first == second == -1 else (first, second)


def _winner(check: Checker, row: dict[str, Any]) -> Review:
    systems = [key for key in row if key != "winner"]
    if len(systems) != 2 or row["winner"] not in (*systems, "tie", None):
        raise check.fail("winner", "expected the name of one of two systems that stand beside it")
    points = {systems[0]: CLASSES["1"], systems[1]: CLASSES["2"], "tie": CLASSES["3"], None: None}[row["winner"]]
    return Review(f"line {check.line}", systems[0], systems[1], "", points, graded=False)
