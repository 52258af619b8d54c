"""How many different things a policy says to one prompt: candidates that say the same teach a rank loss nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.evaluation import EvalResult, drawn
from rankalign.evaluation.statistics import mean_interval
from rankalign.evaluation.texts.lexical import distinct, rouge

ALIKE = 0.7


def distinct_answers(texts: Sequence[str], alike: float = ALIKE) -> int:
    """How many of a set of texts are distinct: a text counts if its ROUGE-L with every earlier one that counts is low.

    The rule and its bound are those by which Self-Instruct kept new instructions (Wang et al. 2023, section 2.2):
    ROUGE-L below 0.7. Texts count in their order, in any script.

    Raises:
        InputError: ``rouge_score`` is missing.
    """
    kept: list[str] = []
    for text in dict.fromkeys(texts):
        if not kept or max(rouge(kept, [[text]] * len(kept))["rougeL"]) < alike:
            kept.append(text)
    return len(kept)


def evaluate_variety(sets: Sequence[CandidateSet], seed: int = 0) -> EvalResult:
    """Distinct answers a prompt, over the prompts with at least two draws.

    Returns:
        Means over prompts: ``answers`` drawn, different ``texts``, ``distinct`` ones among them
        (:func:`distinct_answers`), and ``distinct_2``, the share of different pairs of words in one prompt's answers.
        ``single_answers`` counts the prompts left out. ``n`` counts the others.

    Raises:
        InputError: ``rouge_score`` is missing.
    """
    rows: list[dict[str, Any]] = []
    for record in sets:
        texts = [response.shown() for response in drawn(record)]
        if len(texts) < 2:
            continue
        pairs = distinct(texts, 2)
        row = {"answers": len(texts), "texts": len(set(texts)), "distinct": distinct_answers(texts)}
        rows.append({"id": record.id, **row, **({} if pairs is None else {"distinct_2": pairs})})
    names = ("answers", "texts", "distinct", "distinct_2")
    values = {name: [float(row[name]) for row in rows if name in row] for name in names}
    means = {name: mean_interval(numbers, seed=seed) for name, numbers in values.items() if numbers}
    metrics = {name: mean.value for name, mean in means.items()} | {"single_answers": float(len(sets) - len(rows))}
    return EvalResult(metrics, len(rows), {name: mean.interval for name, mean in means.items()}, rows)
