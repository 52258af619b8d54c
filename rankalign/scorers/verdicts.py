"""Verdicts read from what a judge wrote.

The last statement of a judge counts: what stands before it may weigh, quote, or repeat the question. Thoughts are no
statement. What cannot be read, lies beyond the scale, or could be read in two ways is None, never a number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rankalign.scorers.hardening import GUARD, MARK, fence, harden, soften, total

__all__ = ["GUARD", "MARK", "fence", "harden", "soften", "total"]

T = TypeVar("T")
Scores = tuple[float, float]
Ratings = dict[str, float]

LOWEST, HIGHEST = 1.0, 10.0
AXIS_LOWEST, AXIS_HIGHEST = 1.0, 5.0
LETTERS: dict[str, Scores] = {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (0.5, 0.5)}

# --- what was said and what was only thought ---------------------------------------------------------------------

_KINDS = "think|thinking|thoughts?|reasoning|reason|reflection|analysis|scratchpad|inner_monologue|seed:think"
_OPENS = rf"<\s*(?:{_KINDS})\b[^<>]*>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
_CLOSES = rf"<\s*/\s*(?:{_KINDS})\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>"
_THOUGHT = re.compile(f"(?P<opens>{_OPENS})|(?P<closes>{_CLOSES})", re.IGNORECASE)
# The channels of gpt-oss, as they are and as they look once a server has dropped the special tokens.
_CHANNEL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>|(?<=[^\w\s])\s*assistantfinal(?=\S)")
_CHANNELS = re.compile(r"<\|channel\|>|\Aanalysis(?=[A-Z])|assistantfinal")
_CONTROL = re.compile(r"<\|(?:return|end|im_end|eot_id)\|>|</s>")


def spoken(text: str) -> str | None:
    """``text`` without its thoughts, whatever tags they stand in; None where they were cut before they ended.

    A closing tag alone ends thoughts that the template had opened in the prompt.
    """
    if _CHANNELS.search(text):
        finals = list(_CHANNEL.finditer(text))
        return _CONTROL.sub("", text[finals[-1].end() :]) if finals else None
    depth, start, pieces = 0, 0, list[str]()
    for mark in _THOUGHT.finditer(text):
        if mark["opens"]:
            pieces += [text[start : mark.start()]] * (not depth)
            depth += 1
        elif depth:
            depth -= 1
        else:
            pieces.clear()
        start = mark.end()
    return None if depth else "".join([*pieces, text[start:]])


def _plain(text: str) -> str | None:
    """What was said, with full-width signs as plain ones and without marks of emphasis."""
    said = spoken(text)
    if said is None:
        return None
    # NFKC leaves the lenticular brackets, with which Chinese and Japanese texts write [[A]].
    said = unicodedata.normalize("NFKC", said).translate({0x3010: "[", 0x3011: "]"})
    return re.sub(r"[*`]|\\(?=[\[\]_*])", "", said)


# --- the last statement ------------------------------------------------------------------------------------------

_INSIDE = r"([^\[\]\n]{1,24})"
_TOP = r"(?:\s*(?:/|(?:out )?of)\s*\[{0,2}\s*10\s*\]{0,2}(?!\d))?"
_LABEL = r"\b(?:final|verdict|winner|choice|decision|rating|score)[^\w\[\n]{1,4}"
_CANDIDATE = re.compile(
    rf"\[\[{_INSIDE}\]\]{_TOP}|{_LABEL}\[{_INSIDE}\](?!\]){_TOP}|boxed\{{{_INSIDE}\}}", re.IGNORECASE
)
# A number behind it that makes a range or another scale of it.
_HEDGE = r"\s*[,(]?\s*(?:(?:or|and|to|but|maybe|perhaps|possibly|probably|even|almost|nearly)\s+)+"
_GOES_ON = re.compile(
    rf"\s*(?:%|(?:[-–—−~/⁄+±]+|→|->|\.\.|to\b|or\b|(?:out )?of\b|{_HEDGE})\s*\[{{0,2}}\s*\d)", re.IGNORECASE
)
# A colon behind a quotation mark is JSON's and ends no clause.
_CLAUSE = re.compile(r"\n|(?:[.!?;]|(?<![\"']):)[\"')]*(?:\s|$)")
_COUNTERFACTUAL = re.compile(
    r"\b(?:if|unless|had\s+(?:it|they|the|this|both|answer|assistant)|(?:would|could|might|should)\s*(?:have|not|n't))\b"
    r"|^\W*(?:neither|never)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|never|than|of|over)\s+$", re.IGNORECASE)  # not [[A]], rather than [[B]]
_RETRACTED = re.compile(
    r"(?:^|[.!?\n])\W*(?:wait|actually|correction|sorry|scratch that|hold on|hmm+|no(?=[,.!]))\b"
    r"|\bon (?:second thoughts?|reflection)\b|\bor rather\b|\bno verdict\b"
    r"|\bi (?:retract|withdraw|take (?:it|that) back|was wrong|am (?:not sure|unsure))\b"
    r"|\bi can(?:not|'t) (?:decide|judge|say|tell)\b",
    re.IGNORECASE,
)


def _settled(text: str, read: Callable[[str], T | None]) -> T | None:
    """The one verdict that the last statement holds.

    Clauses that say what would have been are passed over; two different verdicts in the last one, a menu of them on
    several lines, a range, and words behind it that take it back make it unreadable.

    Args:
        text: what the judge wrote.
        read: a candidate's inside to its value; None where it is none.
    """
    said = _plain(text)
    if said is None:
        return None
    clauses = [(a, b, found) for a, b in _clauses(said) if (found := _candidates(said, a, b))]
    if not clauses or _RETRACTED.search(said[clauses[-1][1] :]):
        return None
    start, end, found = clauses[-1]
    values = [None if _GOES_ON.match(said, each.end()) else read(_inside(each)) for each in found]
    alone = all(value == values[0] for value in values)
    listed = _begins_a_line(said, found[0]) and len(clauses) > 1 and _menu(said, clauses[-2][2][-1], found[0])
    if listed and read(_inside(clauses[-2][2][-1])) != values[0]:
        return None
    # A last statement that begins with `or` offers a choice.
    return values[0] if alone and not re.match(r"\W*or\b", said[start:end], re.IGNORECASE) else None


def _clauses(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for end in [*(match.end() for match in _CLAUSE.finditer(text)), len(text)]:
        if not _COUNTERFACTUAL.search(text, start, end):
            yield start, end
        start = end


def _candidates(text: str, start: int, end: int) -> list[re.Match[str]]:
    found = [match for match in _CANDIDATE.finditer(text) if start <= match.end() - 1 < end]
    return [match for match in found if not _NEGATED.search(text[max(start, match.start() - 12) : match.start()])]


def _inside(candidate: re.Match[str]) -> str:
    return next(filter(None, candidate.groups())).strip()


def _begins_a_line(text: str, candidate: re.Match[str]) -> bool:
    return not re.search(r"\w", text[text.rfind("\n", 0, candidate.start()) + 1 : candidate.start()])


def _menu(text: str, one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether two candidates begin neighbouring lines, as in a list of what may be written."""
    between = text[one.end() : other.start()]
    return _begins_a_line(text, one) and between.count("\n") == 1


# --- two answers -------------------------------------------------------------------------------------------------

_SCORE = r"(\d+(?:\.\d+)?)"
_TEN = r"(?:\s*(?:[/⁄]|(?:out )?of)\s*10)?"
_RATING = re.compile(rf"(?:(?:rating|score)\s*[:=]?\s*)?(\d+(?:[.,]\d+)?){_TEN}", re.IGNORECASE)
_RATINGS = re.compile(rf"{_SCORE}{_TEN}\s*,\s*{_SCORE}{_TEN}")
_LETTER = re.compile(
    r"(?:answer |assistant |response |output )?\(?([abc])\)?|(tie)|([ab])\s*(>{1,2}|<{1,2}|=)\s*([ab])"
)


def parse_strict(text: str) -> Scores | None:
    """The published rule of FastChat: the first line, commas as blanks, must be exactly two numbers; from 1 to 10."""
    said = spoken(text) or ""
    line = (said if said == text else said.lstrip()).split("\n", 1)[0]  # what thoughts leave behind is no first line
    fields = unicodedata.normalize("NFKC", line).replace(",", " ").split()
    if len(fields) != 2 or not all(re.fullmatch(r"[0-9]+(?:\.[0-9]*)?", field) for field in fields):
        return None
    return in_range((float(fields[0]), float(fields[1])))


def parse_letter(text: str) -> Scores | None:
    """Points of the first and second answer by the last ``[[A]]``, ``[[B]]`` or ``[[C]]`` (a tie).

    FastChat reads the first letter of the alphabet that stands anywhere, so that a judge who weighs ``[[A]]`` and
    settles on ``[[B]]`` counts for A.
    """
    return _settled(text, _points)


def _points(inside: str) -> Scores | None:
    found = _LETTER.fullmatch(inside.lower())
    if found is None:
        return None
    if found[2] or found[4] == "=":
        return LETTERS["C"]
    letter = found[1] or (found[3] if found[4].startswith(">") else found[5])
    return LETTERS[letter.upper()] if found[1] or found[3] != found[5] else None


def parse_rating(text: str) -> float | None:
    """The last ``[[7]]``, from 1 to 10."""
    return _settled(text, _rating)


def _rating(inside: str) -> float | None:
    found = _RATING.fullmatch(inside)
    return _within(float(found[1].replace(",", ".")), LOWEST, HIGHEST) if found else None


def parse_ratings(text: str) -> Scores | None:
    """The last ``[[7, 9]]``, each from 1 to 10."""
    return _settled(text, _two_ratings)


def _two_ratings(inside: str) -> Scores | None:
    found = _RATINGS.fullmatch(inside)
    return in_range((float(found[1]), float(found[2]))) if found else None


def in_range(scores: Scores | None) -> Scores | None:
    """Two scores if both lie between 1 and 10."""
    return scores if scores and all(LOWEST <= score <= HIGHEST for score in scores) else None


def _within(value: float, low: float, high: float) -> float | None:
    return value if low <= value <= high else None


# --- axes --------------------------------------------------------------------------------------------------------

_VERDICT = re.compile(r"\bverdict[\s_]*[:=-]", re.IGNORECASE)
_SECTION = re.compile(r"\b(?:assistant|answer|response|candidate)[\s#_]*(\d{1,3})\W{0,3}:", re.IGNORECASE)
# What may stand behind a grade: the prompt's own scale, then an end that makes neither a range nor another number.
_ENDS = (
    r"(?:\s*/\s*5(?![\d.,]\d|\d)|\s*\(?(?:out )?of 5\)?(?!\d))?"
    r"(?=[\s,;.!)\]}_\"'|]|$)(?!,\s*\d|[ \t]+\d|\.[\d.]|\s*[%/]|\s*\(?\s*out\b)"
    r"(?!\s*(?:[-–—−~+±]|→|->|to\b|or\b|and\b)\s*[\[(]?\d)"
    # "4, maybe 5" and "4 (or even 5)" are two grades; "4, relevance=5" is one.
    rf"(?!{_HEDGE}[\[(]?\d)"
)
_GRADES = re.compile(r"[\d.,;|/()\[\]\s_-]*")
_GRADE = re.compile(rf"(?<![\d./-]){_SCORE}(?:\s*/\s*5\b)?(?=[\s,;|)\]_.]|$)(?!\.\d|\s*[-/])")


def parse_axes(text: str, axes: Sequence[str]) -> Ratings | None:
    """One number from 1 to 5 for each axis, named, behind the last ``Verdict:``.

    A comma between digits is unreadable: ``4,5`` may be four and a half, or a 4 and the next axis' 5.
    """
    return _behind_verdict(text, lambda part: _ratings(part, axes))


def parse_items(text: str, items: Sequence[str]) -> Ratings | None:
    """``yes`` (1) or ``no`` (0) for each item, named, behind the last ``Verdict:``."""
    return _behind_verdict(text, lambda part: _answers(part, items))


def _behind_verdict(text: str, read: Callable[[str], Ratings | None]) -> Ratings | None:
    said = _plain(text)
    marks = list(_VERDICT.finditer(said or ""))
    if not said or not marks or _RETRACTED.search(said[marks[-1].end() :]):
        return None
    found = read(said[marks[-1].end() :])
    if len(marks) > 1 and not _CLAUSE.search(said, marks[-2].end(), marks[-1].start()):
        before = read(said[marks[-2].end() : marks[-1].start()])  # two verdicts in one sentence
        return found if before in (None, found) else None
    return found


def _answers(text: str, items: Sequence[str]) -> Ratings | None:
    """Each item with yes or no; one that is stated twice must be stated alike."""
    found: Ratings = {}
    for item in items:
        between = r"[\"'_]{0,4}\s{0,4}[:=]?[\s_(\[\"']{0,4}"
        ends = rf"(?!\s*[/|]|\s*\(?\s*(?:or|and|but)\b|{_HEDGE}(?:yes|no)\b)"
        named = re.compile(rf"\b{re.escape(item)}\b{between}(?=(yes|no)\b)(?P<whole>\w+\b{ends})?", re.IGNORECASE)
        stated = {match[1].lower() if match["whole"] else None for match in named.finditer(text)}
        if len(stated) != 1 or None in stated:
            return None
        found[item] = float(stated == {"yes"})
    return found


def parse_grid(text: str, count: int, axes: Sequence[str]) -> list[Ratings] | None:
    """Axes of ``count`` answers, each behind its ``Response 2:`` or the like; the last statement on each counts.

    The axes are named, or the lines behind it hold exactly as many bare numbers as axes, in their order, and nothing
    else.
    """
    said = _plain(text) or ""
    marks = list(_SECTION.finditer(said))
    ends = [*(mark.start() for mark in marks), len(said)][1:]
    found: dict[int, Ratings] = {}
    for mark, end in zip(marks, ends, strict=True):
        part = said[mark.end() : end]
        if ratings := _ratings(part, axes) or _bare(part, axes):
            found[int(mark[1])] = ratings
    return [found[k] for k in range(1, count + 1)] if set(found) == set(range(1, count + 1)) else None


def _ratings(text: str, axes: Sequence[str]) -> Ratings | None:
    """Each axis with a number in range; one that is stated twice must be stated alike."""
    found: Ratings = {}
    for axis in axes:
        name = r"\s+".join(map(re.escape, axis.split()))
        between = r"[\"'_]{0,4}(?:\s*\(1\s*[-–]\s*5\))?\s{0,4}[:=]?[\s_(\[\"']{0,4}"
        named = re.compile(rf"\b{name}\b{between}(?={_SCORE})(?P<whole>\d+(?:\.\d+)?{_ENDS})?", re.IGNORECASE)
        stated = {float(match[1]) if match["whole"] else None for match in named.finditer(text)}
        value = stated.pop() if len(stated) == 1 else None
        if value is None or _within(value, AXIS_LOWEST, AXIS_HIGHEST) is None:
            return None
        found[axis] = value
    return found


def _bare(text: str, axes: Sequence[str]) -> Ratings | None:
    lines = []
    for line in text.split("\n"):
        if not _GRADES.fullmatch(line):
            break
        lines.append(line)
    told = "\n".join(lines)
    numbers = [float(match[1]) for match in _GRADE.finditer(told)]
    whole = len(numbers) == len(re.findall(r"\d+(?:\.\d+)?", re.sub(r"/\s*5\b", "", told)))
    if not whole or len(numbers) != len(axes) or any(_within(n, AXIS_LOWEST, AXIS_HIGHEST) is None for n in numbers):
        return None
    return dict(zip(axes, numbers, strict=True))


# --- orders ------------------------------------------------------------------------------------------------------

_NAMED_ITEM = r"(?:[^\w\s>=]|_){0,4}(?:assistant|answer|response|candidate)[\s#_*]*\d{1,3}(?:[^\w\s>=]|_){0,4}"
_BARE_ITEM = r"[\[(#]?\d{1,3}[\])]?"


def _chain(item: str) -> str:
    return rf"{item}(?:[ \t]*[>=][ \t]*{item})+"


# Named answers may stand anywhere in a sentence; bare numbers count only where they fill the rest of a line, behind a
# colon or alone, for `3 > 2` is arithmetic everywhere else.
_CHAINS = re.compile(
    rf"({_chain(_NAMED_ITEM)})|(?:^|(?<=:))[ \t*_`]*({_chain(_BARE_ITEM)})[ \t*_`.]*$", re.IGNORECASE | re.MULTILINE
)


def parse_order(text: str, count: int) -> list[float] | None:
    """Ranks of ``count`` answers from the last chain, ``Assistant 3 > Assistant 1 = Assistant 2`` or ``3 > 1 = 2``.

    A chain counts if it names each answer from 1 to ``count`` exactly once, and stands behind the last ``Verdict:``
    where there is one. Two that differ in one line are none. Rank 1 is best; tied answers share the better rank and
    the next one comes after all of them (1, 2, 2, 4).
    """
    said = spoken(text) or ""
    start = max((match.end() for match in re.finditer(r"\bverdict[\s*_]*[:=-]", said, re.IGNORECASE)), default=0)
    chains = [(m.start(), ranks) for m in _CHAINS.finditer(said, start) if (ranks := _ranks(m[1] or m[2], count))]
    if not chains or _RETRACTED.search(said[chains[-1][0] :]):
        return None
    line = said.rfind("\n", 0, chains[-1][0]) + 1
    same = [ranks for place, ranks in chains if place >= line]
    return same[-1] if all(ranks == same[-1] for ranks in same) else None


def _ranks(chain: str, count: int) -> list[float] | None:
    parts = re.findall(r"\d+|[>=]", chain)
    names = [int(part) for part in parts[::2]]
    if sorted(names) != list(range(1, count + 1)):
        return None
    ranks = [0.0] * count
    rank = 1.0
    for place, (name, before) in enumerate(zip(names, [">", *parts[1::2]], strict=True), start=1):
        rank = float(place) if before == ">" else rank
        ranks[name - 1] = rank
    return ranks
