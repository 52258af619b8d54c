"""FastChat's judge files: questions, answers of either generation, two-score reviews, and listwise orders.

Questions and answers are files apart, joined by ``question_id``; of an answer in several turns the first is the
response and the others are kept, and so it is with questions in several turns (MT-bench): the first is the prompt,
all of them wait in ``meta["turns"]``, and the later ones are counted. Questions without any answers are prompts.
Reviews add scores to the answers they name: the two numbers of a review, or 1, 0.5, 0 where one number names the
winner; -1 (nothing parsed) is missing. Their judge is the review's ``file``, else ``<reviewer>: <first> | <second>``.
A listwise review that brings its question and answers is a record of its own with scores by judge ``order``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answers import LoneAnswers, Table, key_of
from rankalign.data.formats.common import Dropped
from rankalign.data.records import CandidateSet, Checker, Response

# What a single number says of the first and the second answer.
THREE_CLASSES = {1: (1.0, 0.0), 2: (0.0, 1.0), 3: (0.5, 0.5), -1: (None, None)}


@dataclass(frozen=True)
class FastChat(LoneAnswers):
    """Policies are ``answers_of``, ``model_id`` or, in a listwise review, its ``model_ids``."""

    name = "fastchat"
    reads = frozenset({"text", "prompt", "turns", "choice", "answers_of", "review_id"})

    def unread(self, record: CandidateSet) -> list[str]:
        """As everywhere, and the later turns, which follow the model's own first answer."""
        asked = record.meta.get("turns", [])[1:]
        later = asked or any(response.meta.get(self.name, {}).get("turns") for response in record.responses)
        return [*super().unread(record), *(["turns[1:]"] if later else [])]

    def stage(self, row: dict[str, Any], check: Checker) -> int:
        """Questions, answers, reviews."""
        key_of(row, "question_id", check)
        if "review_id" in row:
            return 1 if "order" in row else 2  # an order brings its question and answers along
        return 1 if row.keys() & {"answer_id", "choices", "generation", "model_id"} else 0

    def take(self, row: dict[str, Any], check: Checker, table: Table) -> None:
        """One row of any kind."""
        key = key_of(row, "question_id", check)
        if "review_id" in row and "order" in row:
            # By review: several judges may have ordered the answers to one question.
            self._take_order(row, check, table.at(f"{row.get('reviewer_id', 'judge')}-{row['review_id']}", check))
        elif "review_id" in row:
            self._take_review(row, check, table.known(key, check, "reviews"))
        elif self.stage(row, check):
            self._take_answer(row, check, table.at(key, check))
        else:
            record = table.at(key, check)
            turns = row["turns"] if "turns" in row else [check.need(row, "text")]
            first = check.array(turns, "turns", at_least=1)[0]
            record.prompt = check.prompt([{"role": "user", "content": first}], "turns" if "turns" in row else "text")
            record.meta.update(_without(row, "text", "question_id"))

    def _take_answer(self, row: dict[str, Any], check: Checker, record: CandidateSet) -> None:
        policy = row.get("answers_of") or row.get("model_id")
        policy = check.text(policy, "model_id", empty=False)
        if "choices" in row:
            choices = check.array(row["choices"], "choices", at_least=1)
            if len(choices) > 1:
                raise check.fail("choices", f"holds {len(choices)} answers where a row is one")
            choice = check.mapping(choices[0], "choices[0]")
            turns = check.array(check.need(choice, "turns", "choices[0]"), "choices[0].turns", at_least=1)
            text = check.text(turns[0], "choices[0].turns[0]")
            kept = _without(row, "choices") | {"choice": _without(choice, "turns"), "turns": turns[1:]}
            record.responses.append(Response(text, policy=policy, meta={self.name: kept}))
            return
        column = "generation" if "generation" in row else "text"
        text = check.text(check.need(row, column), column)
        if column == "generation" and "text" in row:
            record.prompt = record.prompt or check.prompt([{"role": "user", "content": row["text"]}], "text")
        record.responses.append(
            Response(text, policy=policy, meta={self.name: _without(row, column), "column": column})
        )

    def _take_order(self, row: dict[str, Any], check: Checker, record: CandidateSet) -> None:
        metadata = check.mapping(check.need(row, "metadata"), "metadata")
        asked = check.need(metadata, "question", "metadata")
        prompt = check.prompt([{"role": "user", "content": asked}], "metadata.question")
        responses = []
        answers = check.array(check.need(metadata, "answers", "metadata"), "metadata.answers", at_least=2)
        models = check.array(check.need(metadata, "model_ids", "metadata"), "metadata.model_ids")
        order = check.array(row["order"], "order")
        if not len(answers) == len(models) == len(order):
            raise check.fail("order", f"{len(order)} ranks, {len(models)} models and {len(answers)} answers")
        for index, (text, model, rank) in enumerate(zip(answers, models, order, strict=True)):
            scores: dict[str, float | None] = {"order": -check.number(rank, f"order[{index}]")}
            policy = check.text(model, f"metadata.model_ids[{index}]", empty=False)
            answer = check.text(text, f"metadata.answers[{index}]")
            responses.append(Response(answer, policy=policy, scores=scores))
        record.prompt, record.responses = prompt, responses
        kept = _without(row, "order", "metadata") | {"metadata": _without(metadata, "question", "answers", "model_ids")}
        record.meta[self.name] = kept

    def _take_review(self, row: dict[str, Any], check: Checker, record: CandidateSet) -> None:
        sides = [_answer_of(record, check.need(row, f"answer{n}_id"), row.get(f"model_{n}"), check) for n in (1, 2)]
        judge = row.get("file") or f"{row.get('reviewer_id', 'judge')}: {sides[0].policy} | {sides[1].policy}"
        check.text(judge, "file")
        for response, score in zip(sides, _review_scores(check.need(row, "score"), check), strict=True):
            response.scores[judge] = score

    def write(self, records: Any, losses: Losses) -> Any:
        """Answers model by model; listwise reviews as they came, behind them."""
        reviews: list[dict[str, Any]] = []
        yield from super().write(self._answers(records, reviews), losses)
        yield from reviews

    def _answers(self, records: Any, reviews: list[dict[str, Any]]) -> Any:
        for record in records:
            kept = record.meta.get(self.name)
            if isinstance(kept, dict) and "review_id" in kept:
                reviews.append(_review(record, kept))
            else:
                yield record

    def row(self, record: CandidateSet, response: Response, losses: Losses) -> dict[str, Any]:
        """An answer as it came, in the older form where it comes from elsewhere."""
        kept = dict(response.meta.get(self.name, {"question_id": record.id, "model_id": response.policy}))
        if "choice" in kept:
            choice, turns = kept.pop("choice"), kept.pop("turns")
            return {**kept, "choices": [{**choice, "turns": [response.text, *turns]}]}
        return {**kept, response.meta.get("column", "text"): response.text}


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _answer_of(record: CandidateSet, answer_id: Any, model: Any, check: Checker) -> Response:
    """The answer with this id, else that of this model."""
    kept = [(response.meta.get("fastchat", {}), response) for response in record.responses]
    for meta, response in kept:
        if meta.get("answer_id") == answer_id:
            return response
    for meta, response in kept:
        if "answer_id" not in meta and response.policy == model:
            return response
    raise Dropped(check.file, check.line, "", "reviews of an answer that is not here")


def _review_scores(score: Any, check: Checker) -> tuple[float | None, float | None]:
    if isinstance(score, list):
        if len(score) != 2:
            raise check.fail("score", f"expected two scores, found {len(score)}")
        first, second = (check.number(value, f"score[{index}]") for index, value in enumerate(score))
        return None if first == -1 else first, None if second == -1 else second
    if check.number(score, "score") not in THREE_CLASSES:
        raise check.fail("score", f"expected two scores, or 1, 2, 3 or -1, found {score}")
    return THREE_CLASSES[score]


def _review(record: CandidateSet, kept: dict[str, Any]) -> dict[str, Any]:
    content = record.prompt if isinstance(record.prompt, str) else record.prompt[0]["content"]
    texts, policies = [r.text for r in record.responses], [r.policy for r in record.responses]
    metadata = {**kept["metadata"], "question": content, "answers": texts, "model_ids": policies}
    return {**kept, "metadata": metadata, "order": [-(r.scores["order"] or 0) for r in record.responses]}


FORMAT = FastChat()
