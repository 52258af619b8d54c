"""Comparisons gathered from the web: WebGPT, Stanford Human Preferences, paired Stack Exchange answers.

Each row holds a question and two answers in two columns. The columns that carry the verdict stay as they are in
``meta``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rankalign.data.formats import Losses
from rankalign.data.formats.common import RowFormat, prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Response

Scores = dict[str, float | None]


@dataclass(frozen=True)
class QuestionFormat(RowFormat):
    """A question and two answers a row: the policies are called as the columns."""

    question: ClassVar[str]
    answers: ClassVar[tuple[str, str]]
    judges: ClassVar[tuple[str, ...]]

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        asked, note = self.read_question(check.need(row, self.question), check)
        prompt = check.prompt([{"role": "user", "content": asked}], self.question)
        texts = [check.text(check.need(row, column), column) for column in self.answers]
        scores = self.scores(row, check)
        responses = [
            Response(text, policy=column, scores=score)
            for text, column, score in zip(texts, self.answers, scores, strict=True)
        ]
        return CandidateSet("", prompt, responses, keep(self.name, note, row, (self.question, *self.answers)))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came, or a row for each strict pair, the better answer first."""
        policies = tuple(response.policy for response in record.responses)
        if note_of(record, self.name) is not None and policies == self.answers and not self.judge:
            lost_details(record.responses, losses, self.judges, policy=False)
            texts = {response.policy: response.text for response in record.responses}
            yield complete({self.question: self.write_question(record, losses), **texts}, record, self.name, losses)
        else:
            sizes = "score" in self.judges
            yield from self.pair_rows(record, losses, lambda *pair: self._pair_row(record, losses, *pair), sizes)

    def _pair_row(
        self, record: CandidateSet, losses: Losses, better: Response, worse: Response, judge: str
    ) -> dict[str, Any]:
        texts = dict(zip(self.answers, (better.text, worse.text), strict=True))
        asked = self.write_question(record, losses)
        return {self.question: asked, **texts, **self.verdict(better.scores[judge], worse.scores[judge])}

    def read_question(self, value: Any, check: Checker) -> tuple[str, dict[str, Any]]:
        """The question's text, and what else its column holds."""
        return check.text(value, self.question, empty=False), {}

    def write_question(self, record: CandidateSet, losses: Losses) -> Any:
        """What stands in the question's column."""
        return prompt_text(record.prompt, Losses() if _is_question(record) else losses)

    @abstractmethod
    def scores(self, row: dict[str, Any], check: Checker) -> tuple[Scores, Scores]:
        """Scores of the two answers, by judge."""

    @abstractmethod
    def verdict(self, better: float | None, worse: float | None) -> dict[str, Any]:
        """The columns that say so."""


def _is_question(record: CandidateSet) -> bool:
    return isinstance(record.prompt, list) and [message["role"] for message in record.prompt] == ["user"]


@dataclass(frozen=True)
class WebGPT(QuestionFormat):
    """``openai/webgpt_comparisons``: graded from -1 to 1, equal scores are ties, and the better need not be first."""

    name = "webgpt"
    reads = frozenset({"score_0", "score_1"})
    question, answers, judges = "question", ("answer_0", "answer_1"), ("score",)

    def read_question(self, value: Any, check: Checker) -> tuple[str, dict[str, Any]]:
        """An object with ``full_text``; its other keys are kept."""
        asked = check.mapping(value, self.question)
        text = check.text(check.need(asked, "full_text", self.question), "question.full_text", empty=False)
        return text, {"question": {key: kept for key, kept in asked.items() if key != "full_text"}}

    def write_question(self, record: CandidateSet, losses: Losses) -> Any:
        """The object with its ``full_text``."""
        kept = (note_of(record, self.name) or {}).get("question", {})
        return {**kept, "full_text": super().write_question(record, losses)}

    def scores(self, row: dict[str, Any], check: Checker) -> tuple[Scores, Scores]:
        """``score_0`` and ``score_1`` as judge ``score``."""
        first, second = (check.number(check.need(row, key), key) for key in ("score_0", "score_1"))
        return {"score": first}, {"score": second}

    def verdict(self, better: float | None, worse: float | None) -> dict[str, Any]:
        """The scores."""
        return {"score_0": better, "score_1": worse}


@dataclass(frozen=True)
class SHP(QuestionFormat):
    """``stanfordnlp/SHP``: label 1 says that A is better, 0 that B is; the votes are kept as judge ``votes``."""

    name = "shp"
    reads = frozenset({"labels", "score_A", "score_B", "score_ratio"})
    question, answers, judges = "history", ("human_ref_A", "human_ref_B"), (PREFERENCE, "votes")

    def scores(self, row: dict[str, Any], check: Checker) -> tuple[Scores, Scores]:
        """``labels`` as judge ``preference``, ``score_A`` and ``score_B`` as judge ``votes``."""
        label = check.number(check.need(row, "labels"), "labels")
        if label not in (0, 1):
            raise check.fail("labels", f"expected 0 or 1, found {label}")
        votes = [{"votes": check.number(row[key], key)} if key in row else {} for key in ("score_A", "score_B")]
        return {PREFERENCE: float(label), **votes[0]}, {PREFERENCE: float(1 - label), **votes[1]}

    def verdict(self, better: float | None, worse: float | None) -> dict[str, Any]:
        """A is better."""
        return {"labels": 1}


@dataclass(frozen=True)
class StackExchange(QuestionFormat):
    """``lvwerra/stack-exchange-paired``: ``response_j`` got more votes than ``response_k``."""

    name = "stack-exchange"
    question, answers, judges = "question", ("response_j", "response_k"), (PREFERENCE,)

    def scores(self, row: dict[str, Any], check: Checker) -> tuple[Scores, Scores]:
        """The first is better, by judge ``preference``."""
        return {PREFERENCE: 1.0}, {PREFERENCE: 0.0}

    def verdict(self, better: float | None, worse: float | None) -> dict[str, Any]:
        """The columns say it."""
        return {}


WEBGPT, SHP_FORMAT, STACK_EXCHANGE = WebGPT(), SHP(), StackExchange()
