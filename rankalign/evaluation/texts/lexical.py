"""What can be seen in the text itself: length, variety, repetition, copying, lists, refusals, ROUGE; in any script."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rankalign.data.messages import text_of
from rankalign.data.records import CandidateSet, Prompt, Response
from rankalign.data.words import words
from rankalign.errors import InputError, missing_extra
from rankalign.evaluation import EvalResult, drawn, policies
from rankalign.evaluation.columns import Columns
from rankalign.evaluation.statistics import mean_interval
from rankalign.evaluation.texts.different import Different
from rankalign.registry import did_you_mean

# Bullets, numbers and headings; East Asian marks need no blank behind them.
_LIST_LINE = re.compile(r"^\s*(?:[-*+•‣]\s+\S|[・●]\s*\S|\d{1,3}(?:[.)]\s+|[、．）]\s*)\S|#{1,6}\s+\S)")
# With either apostrophe; `sorry` alone is politeness and no refusal.
_REFUSAL = re.compile(
    r"\b(?:i(?:['’]m| am) (?:very |so |really )?sorry,? (?:but|i can)"
    r"|i (?:can ?not|can['’]t|won['’]t|will not|am (?:not able|unable)|['’]m (?:not able|unable)) "
    r"(?:to )?(?:help|assist|answer|provide|fulfil|comply|do that|discuss|give|create|write)"
    r"|i(?:['’]m| am) (?:not able|unable) to"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b)",
    re.IGNORECASE,
)
REFUSAL_WINDOW = 200
COPY_N = 4
NGrams = list[tuple[str, ...]]


# Probes of one text, and those of the answers to one prompt, ask for the same words one after the other.
_words = lru_cache(maxsize=8)(words)


def ngrams(items: Sequence[str], n: int) -> NGrams:
    """All runs of ``n`` neighbours, in order; empty where there are fewer items."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n of a set of texts (Li et al. 2016): different n-grams of words over all n-grams, both over the set.

    None where no text has ``n`` words. It falls as a set grows, so compare sets of one size only.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams of words that stood in it before: ``1 - different / all`` (Welleck et al. 2020).

    0 for a text with fewer than ``n`` words.
    """
    grams = ngrams(_words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copying(text: str, prompt: str, n: int = COPY_N) -> float:
    """Share of a text's n-grams of words that stand in the prompt; 0 for a text with fewer than ``n`` words."""
    grams = ngrams(_words(text), n)
    source = _gram_set(prompt, n)
    return sum(gram in source for gram in grams) / len(grams) if grams else 0.0


@lru_cache(maxsize=2)
def _gram_set(text: str, n: int) -> frozenset[tuple[str, ...]]:
    return frozenset(ngrams(words(text), n))


def list_density(text: str) -> float:
    """Share of a text's lines with content that begin as list items or Markdown headings; 0 for an empty text."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(_LIST_LINE.match(line)) for line in lines) / len(lines) if lines else 0.0


def is_refusal(text: str) -> bool:
    """Whether the first 200 characters hold one of the common English phrases of refusal."""
    return bool(_REFUSAL.search(text[:REFUSAL_WINDOW]))


def prompt_text(prompt: Prompt) -> str:
    """The words a prompt says, without roles."""
    return prompt if isinstance(prompt, str) else "\n\n".join(map(text_of, prompt))


# One number a response, each with what it measures; the hack report reads the same ones.
PROBES: dict[str, Callable[[str, str], float]] = {
    "words": lambda text, prompt: float(len(_words(text))),
    "characters": lambda text, prompt: float(len(text)),
    "repetition": lambda text, prompt: repetition(text),
    "copying": copying,
    "list_density": lambda text, prompt: list_density(text),
    "refusal": lambda text, prompt: float(is_refusal(text)),
}


def probe(response: Response, prompt: Prompt) -> dict[str, float]:
    """All of :data:`PROBES` on what one response says; its thoughts are measured apart, see :func:`probe_thought`."""
    return {name: measure(response.words(), prompt_text(prompt)) for name, measure in PROBES.items()}


def probe_thought(response: Response) -> dict[str, float]:
    """Length and repetition of what a model thought before it answered."""
    thought = response.thought()
    return {"thought_words": float(len(words(thought))), "thought_repetition": repetition(thought)}


def evaluate_lexical(
    sets: Sequence[CandidateSet], tokenizer: Any = None, reference: str = "", seed: int = 0
) -> EvalResult:
    """Length, repetition, variety and the other probes of the responses, with intervals over prompts.

    Args:
        sets: records with responses; a prompt without any is counted in ``empty_prompts``.
        tokenizer: one of transformers, to count ``tokens`` as well.
        reference: policy whose responses are references: ROUGE of the others against the best-fitting one.
        seed: seed of the bootstrap.

    Raises:
        InputError: no response is by ``reference``, or none is left beside them.

    Returns:
        Per-response means (a mean over prompts of the mean over a prompt's draws), ``distinct_1`` to ``distinct_3``
        over all texts; ``thought_words`` and ``thought_repetition`` where any response has a thought, which counts in
        none of the others; ``n`` counts prompts with responses; ``without_reference`` those of them that have no
        reference, whose answers are in no ROUGE.
    """
    _check_reference(sets, reference)
    thinking = any(
        response.thought() for record in sets for response in record.responses if response.policy != (reference or None)
    )
    rows, empty, alone, different = Columns(), 0, 0, {n: Different() for n in (1, 2, 3)}
    for record in sets:
        group = [r for r in drawn(record) if not reference or r.policy != reference]
        if not group:
            empty += 1
            continue
        rows.add(record.id, _means(record, group, tokenizer, reference, thinking))
        alone += bool(reference) and not any(r.policy == reference for r in record.responses)
        for response in group:
            for n, grams in different.items():
                grams.add(map(hash, ngrams(_words(response.words()), n)))
    means = {name: mean_interval(rows.known(name), seed=seed) for name in rows.names}
    variety = {f"distinct_{n}": grams.count() / grams.total for n, grams in different.items() if grams.total}
    metrics = {name: mean.value for name, mean in means.items()} | variety
    metrics["empty_prompts"] = float(empty)
    if reference:
        metrics["without_reference"] = float(alone)
    return EvalResult(metrics, len(rows), {name: mean.interval for name, mean in means.items()}, rows)


def _check_reference(sets: Sequence[CandidateSet], reference: str) -> None:
    found = policies(sets) if reference else []
    if reference and reference not in found:
        raise InputError(f"no answer by reference {reference!r}{did_you_mean(reference, found)}")
    if reference and found == [reference]:
        raise InputError(f"all answers are by reference {reference!r}, so none is left to compare with them")


def _means(
    record: CandidateSet, group: list[Response], tokenizer: Any, reference: str, thinking: bool = False
) -> dict[str, float]:
    """Mean of each probe over one prompt's draws."""
    probes = [probe(response, record.prompt) for response in group]
    values = {name: [found[name] for found in probes] for name in PROBES}
    if thinking:
        apart = [probe_thought(response) for response in group]
        values |= {name: [found[name] for found in apart] for name in apart[0]}
    if tokenizer is not None:
        values["tokens"] = [len(tokenizer(r.words(), add_special_tokens=False)["input_ids"]) for r in group]
    golden = [response.words() for response in record.responses if response.policy == reference]
    if reference and golden:
        values |= rouge([response.words() for response in group], [golden] * len(group))
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


class RougeWords:
    """A tokenizer for ``rouge_score``, whose own knows the letters from a to z and digits and drops all others.

    Words of these alone are cut as there, at apostrophes and underscores, so English figures are the published ones;
    every other word stays whole.
    """

    def tokenize(self, text: str) -> list[str]:
        """Lower-case tokens."""
        return [token for word in words(text) for token in (_LATIN.findall(word) if _plain(word) else [word])]


_LATIN = re.compile("[a-z0-9]+")


def _plain(word: str) -> bool:
    return word.replace("’", "'").isascii()


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures (Lin 2004) of generated texts, each against its best-fitting reference.

    Computed by Google's ``rouge_score`` with stemming off, on :class:`RougeWords`; of several references the one with
    the highest F counts.

    Args:
        texts: T generated texts.
        references: T lists of at least one reference.

    Returns:
        ``{"rouge1": (T,), "rouge2": (T,), "rougeL": (T,)}``, 1.0 for identical texts.

    Raises:
        InputError: the package is missing, or the lengths differ.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing_extra("ROUGE", "report") from None
    if len(texts) != len(references):
        raise InputError(f"{len(texts)} texts but {len(references)} lists of references")
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeWords())
    rows = [scorer.score_multi(list(golden), text) for text, golden in zip(texts, references, strict=True)]
    return {name: [float(row[name].fmeasure) for row in rows] for name in ("rouge1", "rouge2", "rougeL")}
