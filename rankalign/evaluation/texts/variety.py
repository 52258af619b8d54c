"""How many different things a policy says to one prompt: candidates that say the same teach a rank loss nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rankalign.data.records import CandidateSet
from rankalign.evaluation import EvalResult, drawn
from rankalign.evaluation.columns import Columns
from rankalign.evaluation.statistics import mean_intervals
from rankalign.evaluation.texts.lexical import RougeWords, distinct

ALIKE = 0.7


def distinct_answers(texts: Sequence[str], alike: float = ALIKE) -> int:
    """How many of a set of texts are distinct: a text counts if its ROUGE-L with every earlier one that counts is low.

    The rule and its bound are those by which Self-Instruct kept new instructions (Wang et al. 2023, section 2.2):
    ROUGE-L below 0.7. Texts count in their order, in any script.
    """
    tokens = RougeWords().tokenize
    kept: list[tuple[list[str], Counter[str]]] = []
    for text in dict.fromkeys(texts):
        own = tokens(text)
        counts = Counter(own)
        if not any(_alike(own, counts, *other, alike) for other in kept):
            kept.append((own, counts))
    return len(kept)


def _alike(one: list[str], counts: Counter[str], other: list[str], others: Counter[str], bound: float) -> bool:
    """Whether ROUGE-L reaches the bound: words in order are words in common, which are counted ten times faster."""
    common = sum(min(counts[word], others[word]) for word in counts.keys() & others.keys())
    return _f_measure(common, one, other) >= bound and _rouge_l(one, other) >= bound


def _rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L's F-measure as ``rouge_score`` has it, from a longest common subsequence found a hundred times faster."""
    return _f_measure(common_subsequence(one, other), one, other)


def _f_measure(common: int, one: Sequence[str], other: Sequence[str]) -> float:
    if not common:
        return 0.0
    precision, recall = common / len(other), common / len(one)
    return 2 * precision * recall / (precision + recall)


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a column of the usual table in one number of ``len(one)`` bits.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited", figure 2.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(one)) - 1
    column = every
    for word in other:
        met = column & places.get(word, 0)
        column = ((column + met) | (column - met)) & every
    return len(one) - column.bit_count()


def evaluate_variety(sets: Sequence[CandidateSet], seed: int = 0) -> EvalResult:
    """Distinct answers a prompt, over the prompts with at least two draws.

    Returns:
        Means over prompts: ``answers`` drawn, different ``texts``, ``distinct`` ones among them
        (:func:`distinct_answers`), and ``distinct_2``, the share of different pairs of words in one prompt's answers.
        ``single_answers`` counts the prompts left out. ``n`` counts the others.
    """
    rows, single = Columns(), 0
    for record in sets:
        texts = [response.shown() for response in drawn(record)]
        if len(texts) < 2:
            single += 1
            continue
        counts = {"answers": len(texts), "texts": len(set(texts)), "distinct": distinct_answers(texts)}
        rows.add(record.id, {**counts, "distinct_2": distinct(texts, 2)})
    known = {name: rows.known(name) for name in ("answers", "texts", "distinct", "distinct_2")}
    means = mean_intervals({name: numbers for name, numbers in known.items() if len(numbers)}, seed=seed)
    metrics = {name: mean.value for name, mean in means.items()} | {"single_answers": float(single)}
    return EvalResult(metrics, len(rows), {name: mean.interval for name, mean in means.items()}, rows)
