"""The texts of training examples that the ledger calls hard or mislabelled, from wherever the run read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankalign.data.judges import combined, weighted
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Response, score_of
from rankalign.errors import InputError
from rankalign.evaluation.report.runs import Run
from rankalign.evaluation.tables import printable
from rankalign.evaluation.texts.lexical import prompt_text
from rankalign.storage import manifest


@dataclass(frozen=True)
class Texts:
    """A training example as people read it.

    Attributes:
        id: of the prompt.
        prompt: its text.
        best: the answer with the highest score.
        worst: the one with the lowest; None where there is but one.
        score_best: its score by the judge that trained.
        score_worst: the same of the worst.
    """

    id: str
    prompt: str
    best: str
    worst: str | None
    score_best: float | None
    score_worst: float | None


def texts_of(run: Run, wanted: Sequence[str]) -> tuple[dict[str, Texts], str]:
    """Texts by id, and what to say of those that were not found.

    Looked at are the run's ``candidates.jsonl`` and then the files that its training read, as they are named in its
    manifest, unless they have changed since.

    Args:
        run: the run.
        wanted: ids of prompts.
    """
    missing = set(wanted)
    found: dict[str, Texts] = {}
    judge = str(run.training.get("judge") or run.judge)
    _take(run.candidates, judge, missing, found)
    troubles = []
    for path, digest in _files(run) if missing else ():
        try:
            if not path.is_file() or manifest.hashes([path])[str(path)] != digest:
                troubles.append(f"{path.name} is no more as it was")
            else:
                _take(load(str(path)), judge, missing, found)
        except InputError as error:
            troubles.append(str(error))
    if not missing:
        return found, ""
    why = f" ({'; '.join(troubles)})" if troubles else ""
    return found, f"The texts of {len(missing)} of these examples are not at hand{why}."


def _take(records: Iterable[CandidateSet], judge: str, missing: set[str], found: dict[str, Texts]) -> None:
    """Move what is found in ``records`` from ``missing`` to ``found``; stops at the last one."""
    if not missing:
        return
    for record in records:
        if record.id in missing:
            missing.discard(record.id)
            found[record.id] = _texts(record, judge)
            if not missing:
                return


def _texts(record: CandidateSet, judge: str) -> Texts:
    known: list[tuple[float | None, Response]] = [*sorted(_scored(record, judge), key=lambda pair: -pair[0])]
    known = known or [(None, r) for r in record.responses[:1]]
    texts = [printable(response.shown(thoughts=True)) for _, response in known]
    prompt = printable(prompt_text(record.prompt))
    if not known:
        return Texts(record.id, prompt, "", None, None, None)
    if len(known) == 1:
        return Texts(record.id, prompt, texts[0], None, known[0][0], None)
    return Texts(record.id, prompt, texts[0], texts[-1], known[0][0], known[-1][0])


def _scored(record: CandidateSet, judge: str) -> list[tuple[float, Response]]:
    """Responses with the score that training ranked them by; those without one are no candidates."""
    if not (weights := weighted(judge)):
        return [(score, r) for r in record.responses if (score := score_of(record, r, judge)) is not None]
    rows = [[score_of(record, r, name) for name in weights] for r in record.responses]
    whole = [(row, r) for row, r in zip(rows, record.responses, strict=True) if None not in row]
    scores = combined([[float(v) for v in row if v is not None] for row, _ in whole], weights)
    return [(score, r) for score, (_, r) in zip(scores, whole, strict=True)]


def _files(run: Run) -> Iterable[tuple[Path, str]]:
    """Files that the training read, with their SHA-256 of then."""
    for name, content in run.manifests.items():
        if content.get("stage") == "train" and "inputs" in content and "outputs" in content:
            listed = manifest.entries(run.folder / name, content)
            yield from ((entry.path, entry.digest) for entry in listed if entry.role == "input")
