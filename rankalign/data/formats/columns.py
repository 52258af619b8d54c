"""One column an answer: human and judge comparisons, and candidate sets without scores, as papers publish them.

Known by their columns: PandaLM's test set, LLMBar, judged TL;DR summaries, self-instruct's answers of eight models,
DSP's answers by domain. Whatever says which answer is better stays in ``meta`` as it
came, and is read into scores: 1 for the better answer, 0 for the worse, 0.5 each for a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.alpaca import read_instruction
from rankalign.data.formats.common import RowFormat, prompt_text
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.records import CandidateSet, Checker, Response

Verdicts = dict[str, tuple[float | None, float | None]]
WINNERS: dict[Any, tuple[float | None, float | None]] = {
    1: (1.0, 0.0),
    2: (0.0, 1.0),
    0: (0.5, 0.5),
    "1": (1.0, 0.0),
    "2": (0.0, 1.0),
    "Tie": (0.5, 0.5),
}
NO_VERDICT = (None, None)


@dataclass(frozen=True)
class Shape:
    """One published layout.

    Attributes:
        prompt: the prompt's columns; two of them are an instruction and its input.
        answers: the answers' columns.
        verdicts: scores of the two answers by judge.
        nested: a column that is itself an object of answers by policy, or empty.
    """

    prompt: tuple[str, ...]
    answers: tuple[str, ...]
    verdicts: Callable[[dict[str, Any]], Verdicts] = lambda row: {}
    nested: str = ""

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a row has this layout's columns."""
        named = isinstance(row.get(self.nested), dict) if self.nested else True
        return named and all(key in row for key in (*self.prompt, *self.answers))


def winner(value: Any) -> tuple[float | None, float | None]:
    """Scores of two answers from 1, 2, 0 or a word; None each where the value names no winner."""
    return (
        # True equals 1
        WINNERS.get(value, NO_VERDICT) if isinstance(value, int | str) and not isinstance(value, bool) else NO_VERDICT
    )


def _is_pandalm(column: str) -> bool:
    return column.startswith("annotator") or column in ("gpt35_result", "pandalm_result")


def _pandalm(row: dict[str, Any]) -> Verdicts:
    judges = [key for key in row if _is_pandalm(key)]
    return {judge.removesuffix("_result"): winner(row[judge]) for judge in judges}


def _llmbar(row: dict[str, Any]) -> Verdicts:
    found = {"label": winner(row.get("label"))}
    for judge, said in (row["judges"] if isinstance(row.get("judges"), dict) else {}).items():
        both = [winner(said.get(key)) for key in ("order_1", "order_2_swapped")] if isinstance(said, dict) else []
        sums = [[pair[side] for pair in both if pair[side] is not None] for side in (0, 1)]
        # Both orders or nothing: one alone may speak for a place as much as for an answer.
        means = [sum(side) / 2 if len(side) == 2 else None for side in sums]  # type: ignore[arg-type]
        found[judge] = (means[0], means[1])
    return found


def _tldr(row: dict[str, Any]) -> Verdicts:
    sides: Verdicts = {"reference": (1.0, 0.0), "ours": (0.0, 1.0)}
    preferred = row.get("judge_preferred")
    return {"judge": sides.get(preferred, NO_VERDICT) if isinstance(preferred, str) else NO_VERDICT}


SHAPES = (
    Shape(("instruction", "input"), ("response1", "response2"), _pandalm),
    Shape(("input",), ("output_1", "output_2"), _llmbar),
    Shape(("prompt",), ("reference", "summary"), _tldr),
    Shape(("instruction", "input"), ("reference",), nested="candidates"),
    Shape(("query",), (), nested="responses"),
)


@dataclass(frozen=True)
class Columns(RowFormat):
    """Policies are called as the columns."""

    name = "columns"
    reads = frozenset({"label", "judges", "judge_preferred", "shuffled_index"})

    def unread(self, record: CandidateSet) -> list[str]:
        """As everywhere; PandaLM has a column for each annotator and each judge's result."""
        return [name for name in super().unread(record) if not _is_pandalm(name)]

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row of a known layout."""
        shape = next((shape for shape in SHAPES if shape.fits(row)), None)
        if shape is None:
            raise check.fail("", f"no known layout has the columns {', '.join(row) or '(none)'}")
        note: dict[str, Any] = {"shape": SHAPES.index(shape)}
        if len(shape.prompt) == 2:
            prompt, parts = read_instruction(row, check)
            note["parts"] = parts
        else:
            asked = check.text(row[shape.prompt[0]], shape.prompt[0], empty=False)
            prompt = [{"role": "user", "content": asked}]
        texts = {key: check.text(row[key], key) for key in shape.answers}
        if shape.nested:
            nested = row[shape.nested]
            texts |= {policy: check.text(text, f"{shape.nested}.{policy}") for policy, text in nested.items()}
            if len(texts) < len(shape.answers) + len(nested):
                raise check.fail(shape.nested, "names an answer that has a column of its own")
        scores: list[dict[str, float | None]] = [{} for _ in texts]
        for judge, pair in shape.verdicts(row).items():
            for index, score in enumerate(pair):
                scores[index][judge] = score
        responses = [Response(texts[p], policy=p, scores=s) for p, s in zip(texts, scores, strict=True)]
        used = (*shape.prompt, *shape.answers, shape.nested)
        return CandidateSet("", prompt, responses, keep(self.name, note, row, used))

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """The row as it came; else ``query`` and an object of ``responses`` by policy."""
        note, texts = note_of(record, self.name), {response.policy: response.text for response in record.responses}
        if len(texts) < len(record.responses):
            losses.add("responses of a policy that has another", len(record.responses) - len(texts))
        row: dict[str, Any]
        if note is None or not self._is_whole(note, texts):
            lost_details(record.responses, losses, policy=False)
            row = {"query": prompt_text(record.prompt, losses), "responses": texts}
        else:
            shape = SHAPES[note["shape"]]
            known = {judge for response in record.responses for judge in response.scores}
            lost_details(record.responses, losses, known & set(shape.verdicts(record.meta)), policy=False)
            row = dict(note.get("parts") or {shape.prompt[0]: prompt_text(record.prompt, Losses())})
            row |= {key: texts.pop(key) for key in shape.answers}
            if shape.nested:
                row[shape.nested] = texts
        yield complete(row, record, self.name, losses)

    def _is_whole(self, note: dict[str, Any], texts: dict[str, str]) -> bool:
        shape = SHAPES[note["shape"]]
        return set(shape.answers) <= texts.keys() and (bool(shape.nested) or len(texts) == len(shape.answers))


FORMAT = Columns()
