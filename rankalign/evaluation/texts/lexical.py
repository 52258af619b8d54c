"""What can be seen in the text itself: length, variety, repetition, copying, lists, refusals, ROUGE; in any script."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rankalign.data.messages import text_of
from rankalign.data.records import CandidateSet, Prompt, Response
from rankalign.data.words import words
from rankalign.errors import InputError, missing_extra
from rankalign.evaluation import EvalResult, drawn, policies
from rankalign.evaluation.columns import Columns
from rankalign.evaluation.statistics import mean_intervals
from rankalign.evaluation.texts.different import Different
from rankalign.evaluation.texts.numbered import Keys, different, hashed, runs
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
_OF_REFUSALS = ("sorry", "i can", "i won", "i will", "able", "as a")
REFUSAL_WINDOW = 200
COPY_N = 4
NGrams = list[tuple[str, ...]]


@lru_cache(maxsize=8)
def _hashes(text: str) -> Keys:
    """(W,) a text's words; its probes, and those of the answers to one prompt, ask for the same one after the other."""
    return hashed(words(text))


def ngrams(items: Sequence[str], n: int) -> NGrams:
    """All runs of ``n`` neighbours, in order; empty where there are fewer items."""
    return list(zip(*(items[start:] for start in range(n)), strict=False))


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
    grams = runs(_hashes(text), n)
    return 1 - different(grams) / len(grams) if len(grams) else 0.0


def copying(text: str, prompt: str, n: int = COPY_N) -> float:
    """Share of a text's n-grams of words that stand in the prompt; 0 for a text with fewer than ``n`` words."""
    grams, source = runs(_hashes(text), n), _run_set(prompt, n)
    return sum(map(source.__contains__, grams.tolist())) / len(grams) if len(grams) and source else 0.0


@lru_cache(maxsize=2)
def _run_set(text: str, n: int) -> frozenset[int]:
    return frozenset(runs(_hashes(text), n).tolist())


def list_density(text: str) -> float:
    """Share of a text's lines with content that begin as list items or Markdown headings; 0 for an empty text."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(_LIST_LINE.match(line)) for line in lines) / len(lines) if lines else 0.0


def is_refusal(text: str) -> bool:
    """Whether the first 200 characters hold one of the common English phrases of refusal."""
    begins = text[:REFUSAL_WINDOW]
    # Each phrase holds one of these, and most answers hold none: a tenth of the expression's time.
    if begins.isascii() and not any(map(begins.lower().__contains__, _OF_REFUSALS)):
        return False
    return bool(_REFUSAL.search(begins))


def prompt_text(prompt: Prompt) -> str:
    """The words a prompt says, without roles."""
    return prompt if isinstance(prompt, str) else "\n\n".join(map(text_of, prompt))


# One number a response, each with what it measures; the hack report reads the same ones.
PROBES: dict[str, Callable[[str, str], float]] = {
    "words": lambda text, prompt: float(len(_hashes(text))),
    "characters": lambda text, prompt: float(len(text)),
    "repetition": lambda text, prompt: repetition(text),
    "copying": copying,
    "list_density": lambda text, prompt: list_density(text),
    "refusal": lambda text, prompt: float(is_refusal(text)),
}


def length(response: Response) -> float:
    """How many words an answer says."""
    return float(len(words(response.words())))


def probe(said: str, asked: str) -> dict[str, float]:
    """All of :data:`PROBES` on what one response says to a prompt; thoughts are measured apart, see below."""
    return {name: measure(said, asked) for name, measure in PROBES.items()}


def probe_thought(thought: str) -> dict[str, float]:
    """Length and repetition of what a model thought before it answered."""
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
    rows, empty, alone, counted = Columns(), 0, 0, {n: Different() for n in (1, 2, 3)}
    for record in sets:
        group = [r for r in drawn(record) if not reference or r.policy != reference]
        if not group:
            empty += 1
            continue
        texts = [response.words() for response in group]
        found = _means(texts, prompt_text(record.prompt), counted, tokenizer)
        if thinking:
            found |= _mean_of([probe_thought(response.thought()) for response in group])
        golden = [r.words() for r in record.responses if r.policy == reference] if reference else []
        if golden:
            found |= {name: sum(own) / len(own) for name, own in rouge(texts, [golden] * len(texts)).items()}
        alone += bool(reference) and not golden
        rows.add(record.id, found)
    means = mean_intervals({name: rows.known(name) for name in rows.names}, seed=seed)
    variety = {f"distinct_{n}": grams.count() / grams.total for n, grams in counted.items() if grams.total}
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


def _means(texts: Sequence[str], asked: str, counted: Mapping[int, Different], tokenizer: Any) -> dict[str, float]:
    """Mean of each probe over one prompt's draws, whose runs of words are counted on the way."""
    probes = []
    for text in texts:
        found = probe(text, asked)
        for n, grams in counted.items():
            grams.add(runs(_hashes(text), n))
        if tokenizer is not None:
            found["tokens"] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        probes.append(found)
    return _mean_of(probes)


def _mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


class RougeWords:
    """A tokenizer for ``rouge_score``, whose own knows the letters from a to z and digits and drops all others.

    Words of these alone are cut as there, at apostrophes and underscores, so English figures are the published ones;
    every other word stays whole.
    """

    def tokenize(self, text: str) -> list[str]:
        """Lower-case tokens."""
        if text.isascii():
            return _LATIN.findall(text.lower())  # the same, seven times as fast: each of its signs is in a plain word
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
