"""Diverse beam search on the default model: its answers differ early, where those of plain beams differ late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rankalign.data.records import CandidateSet, read
from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.evaluation.texts.lexical import distinct, words
from rankalign.evaluation.texts.variety import distinct_answers
from rankalign.models import default as default_model
from rankalign.models import load as models

OPENING = 5  # words


def answers(prompts: Sequence[CandidateSet], **search: float) -> list[list[str]]:
    sampling = SamplingParams(n=4, num_beams=4, max_new_tokens=24, **search)  # type: ignore[arg-type]
    engine = HFEngine(Policy("beams", model="default", sampling=sampling))
    return [[response.text for response in row] for row in engine.generate(prompts)]


@pytest.mark.slow
@pytest.mark.weights
def test_four_groups_give_more_distinct_answers_than_plain_beams() -> None:
    if not (models.cache_dir() / default_model.NAME).is_dir():
        pytest.skip("the default model is not in the cache")
    folder = Path(__file__).parents[2] / "data_generation/demo"
    prompts = list(read(folder / "heldout.jsonl"))[:16]
    found = {"plain": answers(prompts), "diverse": answers(prompts, num_beam_groups=4, diversity_penalty=1.0)}
    # Plain beams never repeat a whole sequence, they repeat its beginning: what differs is counted there, and in pairs
    # of words. Groups are free to agree, and did once in these 64 answers.
    openings = {k: [len({tuple(words(text)[:OPENING]) for text in row}) for row in rows] for k, rows in found.items()}
    spread = {k: sum(distinct(row, 2) or 0 for row in rows) / len(rows) for k, rows in found.items()}
    # By Self-Instruct's rule an answer that says an earlier one in nearly the same words is not a distinct one.
    counts = {k: [distinct_answers(row) for row in rows] for k, rows in found.items()}
    print("distinct answers", {k: sum(v) for k, v in counts.items()})
    print("distinct openings", {k: sum(v) for k, v in openings.items()}, "distinct-2", spread)
    assert sum(counts["diverse"]) > sum(counts["plain"])
    assert sum(openings["diverse"]) > 2 * sum(openings["plain"])
    assert all(more >= fewer for more, fewer in zip(openings["diverse"], openings["plain"], strict=True))
    assert spread["diverse"] > 1.5 * spread["plain"]
