"""How close a model's own answers come to held-out best responses while it trains: ROUGE on generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankalign.data.records import CandidateSet, by_id, choose_judge, judges
from rankalign.errors import InputError
from rankalign.evaluation.texts.lexical import rouge
from rankalign.evaluation.texts.while_training import Answer


class RougeWatch:
    """Answers held-out prompts and sets the answers against the best responses.

    Answers are generated token by token: figures from the most likely next token behind the reference's own words
    (teacher forcing) say little of what a model writes.

    Args:
        sets: records whose prompts are answered.
        best: the response to compare with, by record id; a record without one is not asked.
        answer: how a model is asked.

    Raises:
        InputError: nothing to compare with, or ``rouge_score`` is missing.
    """

    def __init__(self, sets: Sequence[CandidateSet], best: Mapping[str, str], answer: Answer) -> None:
        self.sets = [record for record in sets if record.id in best]
        if not self.sets:
            raise InputError("ROUGE needs held-out prompts with a response to compare with")
        self.references = [[best[record.id]] for record in self.sets]
        self.answer = answer
        rouge([""], [[""]])  # a missing package is said before the training, not at its first measurement

    def __call__(self, model: Any) -> dict[str, float]:
        """Mean F-measures ``rouge1``, ``rouge2``, ``rougeL`` over ``rouge_prompts`` prompts."""
        found = rouge(self.answer(model, self.sets), self.references)
        means = {name: sum(values) / len(values) for name, values in found.items()}
        return {**means, "rouge_prompts": float(len(self.sets))}


def best_texts(sets: Sequence[CandidateSet], judge: str = "") -> dict[str, str]:
    """The text of each record's best response by id, the first of equals; an only response needs no score.

    Raises:
        InputError: several responses and no judge to choose by.
    """
    if not judge and not judges(sets) and all(len(record.responses) <= 1 for record in sets):
        return {ident: record.responses[0].words() for ident, record in by_id(sets).items() if record.responses}
    name = choose_judge(sets, judge)
    scored = {
        ident: [(s, x.words()) for x in record.responses if (s := x.scores.get(name)) is not None]
        for ident, record in by_id(sets).items()
    }
    return {ident: max(pairs, key=lambda pair: pair[0])[1] for ident, pairs in scored.items() if pairs}
