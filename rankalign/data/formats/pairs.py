"""Two answers in two columns and a verdict in a third: PKU-SafeRLHF, HelpSteer's preferences, and the like.

A verdict in words (``A``, ``response_1``, ``model_b``, ``tie``) is read under any of the usual names. A number without
a published meaning is not: 1 is the first answer to some and the second to others, so the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rankalign.data.formats import Losses
from rankalign.data.formats.aliases import PROMPTS, first, number_in, prompt_of, respelt, spelling
from rankalign.data.formats.alpaca_eval import win_probability
from rankalign.data.formats.answered import answered, spelt
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.messages import text_of as message_content
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Response
from rankalign.storage.jsonl import kind

Scores = dict[str, tuple[float | None, float | None]]
FIRST, SECOND, TIE, NONE = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (None, None)
# Columns of two answers of which neither is the better by its name, and of two of which the first is.
OPEN = (
    *((f"{stem}{mark}{a}", f"{stem}{mark}{b}")
      for stem in ("response", "answer", "completion", "output", "text", "generation", "candidate", "model_output")
      for mark in ("_", "")
      for a, b in (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))),
    ("generation_1", "generation_2"),
)  # fmt: skip
ORDERED = (
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"), ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"), ("chosen_answer", "rejected_answer"), ("accepted", "rejected"),
    ("better_response", "worse_response"), ("better", "worse"), ("winner_response", "loser_response"),
    ("positive", "negative"), ("pos", "neg"), ("y_w", "y_l"), ("output_w", "output_l"), ("win", "lose"),
)  # fmt: skip
VERDICTS = ("winner", "preference", "preferred", "better", "better_response", "verdict", "choice", "label", "chosen",
            "overall_preference", "human_preference", "preferred_response", "judgment", "judgement")  # fmt: skip
_SIGNED = re.compile(r"([ab])\s*([<>]{1,2}|=)\s*([ab])")  # A>B, as JudgeBench and Arena-Hard write it
_TIES = {"tie", "ties", "draw", "both", "equal", "same", "c", "neither", "bothbad", "both_bad", "tie (bothbad)", "none"}


_STEMS = ("model", "response", "answer", "completion", "output", "assistant")


def worded(
    value: Any, path: str, answers: tuple[str, str], check: Checker, writers: Sequence[Any] = ()
) -> tuple[float | None, float | None]:
    """Scores of two answers from a verdict in words: a column, its letter, the model (one of ``writers``), a tie.

    Raises:
        RecordError: it names neither of them nor a tie.
    """
    if value is None:
        return NONE
    said = value.strip().lower() if isinstance(value, str) else ""
    sides = zip(answers, ("a", "b"), [*writers, None, None][:2], (FIRST, SECOND), strict=True)
    for answer, letter, writer, scores in sides:
        ends = {letter, answer[-1].lower()}
        names = {f"{stem}{mark}{end}" for stem in _STEMS for mark in ("_", " ", "") for end in ends}
        if said and (said in names | {letter, answer.lower()} or value == writer):
            return scores
    if (signed := _SIGNED.fullmatch(said)) and signed[1] != signed[3]:
        if signed[2] == "=":
            return TIE
        return FIRST if (signed[2][0] == ">") == (signed[1] == "a") else SECOND
    if said in _TIES:
        return TIE
    ways = f"{answers[0]}, {answers[1]} or tie"
    raise check.fail(path, f"does not say which answer is better ({ways}): found {value!r} ({kind(value)})")


@dataclass(frozen=True)
class PairColumns(RowFormat):
    """Any two answer columns of :data:`OPEN` or :data:`ORDERED`, and a verdict in words."""

    name = "pairs"
    full = True
    prompts: ClassVar[tuple[str, ...]] = PROMPTS
    # Which columns name who wrote each answer.
    writers: ClassVar[tuple[tuple[str, str], ...]] = (
        ("model_a", "model_b"),
        ("model_1", "model_2"),
        ("model_A", "model_B"),
    )
    reads = frozenset(VERDICTS)

    def columns(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """The columns of the two answers."""
        return next((pair for pair in (*ORDERED, *OPEN) if pair[0] in row and pair[1] in row), None)

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a row has a prompt and two answers."""
        return bool(first(row, self.prompts)) and self.columns(row) is not None

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        pair, asked = self.columns(row), first(row, self.prompts)
        if pair is None or not asked:
            raise check.fail("", f"needs a prompt and two answers (found: {', '.join(row) or 'nothing'})")
        prompt = prompt_of(row[asked], asked, check)
        responses = [answered(check, row[column], column, policy=column) for column in pair]
        for judge, scores in self.verdicts(row, pair, check).items():
            for response, score in zip(responses, scores, strict=True):
                response.scores[judge] = score
        for response, name in zip(responses, self.writers_of(row), strict=False):
            response.policy = name
        policies = [response.policy for response in responses]
        note = {"pair": [asked, *pair], "text": spelling(row[asked], prompt), "policies": policies}
        return CandidateSet("", prompt, responses, keep(self.name, note, row, (asked, *pair)))

    def writers_of(self, row: dict[str, Any]) -> list[str]:
        """Who wrote the two answers, where the row says so."""
        named = ([row.get(column) for column in columns] for columns in self.writers)
        return next(([str(name) for name in names] for names in named if all(map(_is_name, names))), [])

    def verdicts(self, row: dict[str, Any], pair: tuple[str, str], check: Checker) -> Scores:
        """Scores of the two answers by judge; empty where the row brings no verdict."""
        if pair in ORDERED:
            return {PREFERENCE: FIRST}
        column = first({key: row[key] for key in row if key not in pair}, VERDICTS)
        if pair == ("output_1", "output_2") and column == "preference" and not isinstance(row[column], str):
            return {PREFERENCE: _farmed(row, column, check)}
        return {PREFERENCE: worded(row[column], column, pair, check, self.writers_of(row))} if column else {}

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came, or a row for each strict pair, ``response_a`` the better one."""
        note = note_of(record, self.name) or {}
        policies = [response.policy for response in record.responses]
        if note.get("policies") == policies and not self.judge and self._still_says_so(record, note):
            known = self._verdicts_again(record, note)
            lost_details(record.responses, losses, known, policy=False, meta=False, messages=False)
            asked, *pair = note["pair"]
            texts = {column: spelt(response) for column, response in zip(pair, record.responses, strict=True)}
            yield complete({asked: respelt(record, note["text"]), **texts}, record, self.name, losses)
            return
        yield from self.pair_rows(record, losses, lambda better, worse, _: self.row_of(record, better, worse))

    def row_of(self, record: CandidateSet, better: Response, worse: Response) -> dict[str, Any]:
        """A strict pair of a record from elsewhere."""
        return {"prompt": record.prompt, "response_a": spelt(better), "response_b": spelt(worse), "winner": "A"}

    def _verdicts_again(self, record: CandidateSet, note: dict[str, Any]) -> Scores:
        check = Checker("<record>", 0)
        return self.verdicts(record.meta, (note["pair"][1], note["pair"][2]), check)

    def _still_says_so(self, record: CandidateSet, note: dict[str, Any]) -> bool:
        """Whether the kept columns say what the scores say: a verdict may have been changed since."""
        found = self._verdicts_again(record, note)
        return all(tuple(record.scores(judge)) == scores for judge, scores in found.items())


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _farmed(row: dict[str, Any], column: str, check: Checker) -> tuple[float | None, float | None]:
    """AlpacaFarm's and AlpacaEval's number: 1 is the first output, 2 the second, 1.5 (or 0) a tie."""
    try:
        win = win_probability(number_in(row[column], column, check))
    except ValueError as error:
        raise check.fail(column, str(error)) from None
    return NONE if win is None else (1 - win, win)


def _index(row: dict[str, Any], column: str, check: Checker) -> tuple[float | None, float | None]:
    """The verdict of a column that holds the index of the better answer; -1 is none."""
    value = row[column]
    if isinstance(value, bool) or value not in (0, 1, -1):  # True equals 1
        raise check.fail(column, f"expected 0 or 1, found {value!r}")
    return {0: FIRST, 1: SECOND, -1: NONE}[int(value)]


@dataclass(frozen=True)
class PKU(PairColumns):
    """PKU-SafeRLHF: the more helpful answer is judge ``preference``, the safer one ``safer``, each one's ``safe``.

    ``severity`` is the level of harm, turned round.
    """

    name = "pku"
    writers = (("response_0_source", "response_1_source"),)
    prompts = ("prompt",)
    reads = frozenset(
        {"better_response_id", "safer_response_id"}
        | {f"is_response_{side}_safe" for side in (0, 1)}
        | {f"response_{side}_severity_level" for side in (0, 1)}
    )

    def columns(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Always the same."""
        return ("response_0", "response_1") if {"response_0", "response_1"} <= row.keys() else None

    def verdicts(self, row: dict[str, Any], pair: tuple[str, str], check: Checker) -> Scores:
        """Of those columns that the row has."""
        found: Scores = {}
        for column, judge in (("better_response_id", PREFERENCE), ("safer_response_id", "safer")):
            if row.get(column) is not None:
                found[judge] = _index(row, column, check)
        for judge, column, sign in (("safe", "is_response_{}_safe", 1), ("severity", "response_{}_severity_level", -1)):
            names = [column.format(side) for side in (0, 1)]
            if all(row.get(name) is not None for name in names):
                scores = [number_in(row[name], name, check) for name in names]
                found[judge] = (_signed(scores[0], sign), _signed(scores[1], sign))
        if not found:
            raise check.fail("better_response_id", "is missing, and so is any other verdict")
        return found

    def row_of(self, record: CandidateSet, better: Response, worse: Response) -> dict[str, Any]:
        """The better answer first."""
        return {
            "prompt": text_of(record),
            "response_0": spelt(better),
            "response_1": spelt(worse),
            "better_response_id": 0,
        }


def _signed(value: float | None, sign: int) -> float | None:
    return None if value is None else (sign * value) or 0.0  # a 0 turned round is no -0.0


def text_of(record: CandidateSet) -> Any:
    """A lone question as text, any other prompt as it is."""
    prompt = record.prompt
    if isinstance(prompt, list) and [message["role"] for message in prompt] == ["user"]:
        return message_content(prompt[0])
    return prompt


@dataclass(frozen=True)
class HelpSteerPairs(PairColumns):
    """HelpSteer2's and 3's preferences: a strength from -3 (the first is much better) to 3 (the second)."""

    name = "helpsteer"
    prompts = ("prompt", "context")
    STRENGTHS: ClassVar[tuple[str, ...]] = ("preference_strength", "overall_preference")
    # What each annotator said, of which the strength is the summary.
    reads = frozenset(
        {*STRENGTHS, "preference_statement", "preference_elaboration", "individual_preference"}
        | {"three_most_similar_preferences", "all_preferences_unprocessed"}
    )

    def columns(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """With and without a dash."""
        return next(
            (p for p in (("response_1", "response_2"), ("response1", "response2")) if set(p) <= row.keys()), None
        )

    def verdicts(self, row: dict[str, Any], pair: tuple[str, str], check: Checker) -> Scores:
        """The sign of the strength; 0 is a tie."""
        column = first(row, self.STRENGTHS)
        if not column:
            raise check.fail("preference_strength", "is missing, and so is overall_preference")
        strength = number_in(row[column], column, check)
        if strength is None:
            return {PREFERENCE: NONE}
        if abs(strength) > 3:
            raise check.fail(column, f"expected -3 to 3, found {strength}")
        return {PREFERENCE: FIRST if strength < 0 else SECOND if strength > 0 else TIE}

    def row_of(self, record: CandidateSet, better: Response, worse: Response) -> dict[str, Any]:
        """The first is better, by how much nobody said."""
        texts = {"response_1": spelt(better), "response_2": spelt(worse)}
        return {"prompt": text_of(record), **texts, "preference_strength": -1}


PAIRS, PKU_FORMAT, HELPSTEER_PAIRS = PairColumns(), PKU(), HelpSteerPairs()
