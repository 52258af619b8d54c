"""What a model writes while it trains, graded by a cheap scorer: win rate against its start, repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.evaluation.statistics import wilson
from rankalign.evaluation.texts.lexical import repetition
from rankalign.scorers import Scorer

Answer = Callable[[Any, Sequence[CandidateSet]], list[str]]
"""Answers of a model to the prompts of records, in order."""


class Watch:
    """Answers a few held-out prompts and sets them against the start model's answers.

    Args:
        prompts: records whose prompts are answered; their responses are not read.
        answer: how a model is asked, the same way each time.
        scorer: grades the answers.
        start: the model before training.
        keep: file for the answers of the last measurement beside those of the start model, for people; None keeps none.

    Raises:
        InputError: there are no prompts.
    """

    def __init__(
        self, prompts: Sequence[CandidateSet], answer: Answer, scorer: Scorer, start: Any, keep: Path | None = None
    ) -> None:
        if not prompts:
            raise InputError("there are no prompts to watch")
        self.prompts, self.answer, self.scorer, self.keep = list(prompts), answer, scorer, keep
        self.start, self.before = self._graded(start)  # once: the start model need not stay in memory

    def _graded(self, model: Any) -> tuple[list[str], list[float | None]]:
        texts = self.answer(model, self.prompts)
        sets = [replace(p, responses=[Response(text, "watched")]) for p, text in zip(self.prompts, texts, strict=True)]
        return texts, [row[0] for row in self.scorer.score(sets)]

    def __call__(self, model: Any) -> dict[str, float]:
        """``win_rate`` (ties half) with Wilson's 95 % interval, ``watched`` (prompts scored twice), ``repetition``.

        A prompt without a score now or at the start is in no win rate; with none there is no win rate.
        """
        texts, after = self._graded(model)
        if self.keep is not None:
            write(self.keep, self._kept(texts, after))
        pairs = [(x, y) for x, y in zip(after, self.before, strict=True) if x is not None and y is not None]
        found = {"repetition": sum(map(repetition, texts)) / len(texts), "watched": float(len(pairs))}
        if not pairs:
            return found
        wins = sum((1 + (x > y) - (x < y)) / 2 for x, y in pairs)
        low, high = wilson(wins, len(pairs))
        return found | {"win_rate": wins / len(pairs), "win_rate_low": low, "win_rate_high": high}

    def _kept(self, texts: list[str], scores: list[float | None]) -> Iterator[CandidateSet]:
        rows = zip(self.prompts, self.start, self.before, texts, scores, strict=True)
        for prompt, old, before, new, after in rows:
            sides = (("start", old, before), ("now", new, after))
            yield replace(prompt, responses=[Response(text, name, scores={"watch": s}) for name, text, s in sides])
