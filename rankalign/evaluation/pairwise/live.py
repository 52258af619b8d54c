"""``rankalign compare`` with a live judge: a resumable scoring run over pairs, and its verdicts counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankalign.config import ScoreConfig, ScorerConfig, read_yaml
from rankalign.data.records import CandidateSet, read, write
from rankalign.errors import InputError
from rankalign.evaluation.pairwise.orders import compare_reviews
from rankalign.evaluation.pairwise.pairing import GENERAL, PROMPTS, counts, pair_up, reviews
from rankalign.evaluation.pairwise.reviews import read_reviews
from rankalign.evaluation.pairwise.scores import Comparison
from rankalign.stages.generation import score
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import dumps, write_rows


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge's settings file.

    Attributes:
        name: under which its verdicts are kept.
        options: keywords of :class:`rankalign.scorers.judge.JudgeScorer`.
        prompts: the prompt for each kind of question.
    """

    name: str
    options: dict[str, Any]
    prompts: dict[str, str]


def read_judge(path: str) -> Judge:
    """Settings of a judge for pairs: those of a ``kind: judge`` scorer, and ``prompts`` by kind of question.

    Raises:
        InputError: it is not about pairs, or names a kind that is not known.
    """
    options = read_yaml(path)
    name, kind, mode = options.pop("name", "judge"), options.pop("kind", "judge"), options.pop("mode", "pairwise")
    prompts = {**PROMPTS, **(options.pop("prompts", None) or {})}
    if kind != "judge" or mode != "pairwise":
        raise InputError(f"{path}: comparing needs kind: judge and mode: pairwise")
    if unknown := set(prompts) - set(PROMPTS):
        raise InputError(f"{path}: prompts: {', '.join(sorted(unknown))} is none of {', '.join(PROMPTS)}")
    if "prompt" in options:
        prompts = dict.fromkeys(prompts, options.pop("prompt"))
    return Judge(str(name), {**options, "mode": mode}, prompts)


def judge_pairs(
    judge: Judge,
    a: Sequence[CandidateSet],
    b: Sequence[CandidateSet],
    names: tuple[str, str],
    categories: dict[str, str],
    folder: Path,
    seed: int,
    on_error: str = "stop",
    retry_failed: bool = False,
) -> Comparison:
    """Ask the judge about every prompt in both orders and count its verdicts; the same call goes on where it stopped.

    The folder holds the pairs and verdicts by kind of question, ``reviews.jsonl``, and ``audit.json``, which
    ``rankalign report`` shows. What to do about calls that fail is as in :class:`rankalign.config.ScoreConfig`.

    Raises:
        InputError: not one verdict could be read; the folder holds them.
    """
    judged = []
    for kind, records in sorted(pair_up(a, b, names, categories).items()):
        pairs = folder / f"pairs-{kind}.jsonl"
        write(pairs, records)
        options = {**judge.options, "prompt": judge.prompts[kind]}
        output = folder / f"judged-{kind}.jsonl"
        scorers = [ScorerConfig(judge.name, "judge", options)]
        score(ScoreConfig(str(pairs), str(output), scorers, on_error=on_error, retry_failed=retry_failed))
        judged += list(read(output))
    write_rows(folder / "reviews.jsonl", reviews(judged, judge.name))
    kinds = {record.id: record.meta.get("category", GENERAL) for record in judged}
    try:
        comparison = compare_reviews(read_reviews(folder / "reviews.jsonl"), "stored", names[1], kinds, seed)
    except InputError as error:  # nothing was asked, or nothing can be read
        comparison = Comparison([], "stored", extra={"note": str(error)})
    comparison.extra.update(judge=judge.name, **counts(judged, judge.name))
    write_text(folder / "audit.json", dumps(comparison.as_dict()) + "\n")  # before the refusal, whose reasons it shows
    if comparison.extra.get("calls") and not comparison.extra["parsed"]:
        raise InputError(
            f"judge {judge.name!r}: none of its {comparison.extra['calls']} verdicts could be read (parse rate 0); "
            f"{folder / 'reviews.jsonl'} has what it wrote: try more max_new_tokens, another prompt or model"
        )
    return comparison
