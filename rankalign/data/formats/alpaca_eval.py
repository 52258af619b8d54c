"""AlpacaEval: model outputs, annotations with both outputs, and preferences without texts.

Rows of outputs, ``{"instruction", "output", "generator"}``, of any number of models become one record an instruction.
An annotation says how ``generator_2`` fares against ``generator_1``: its ``preference`` less 1 is the probability
that it wins, 0 and 1.5 are draws, null is missing. That is a score of ``generator_2`` by judge ``annotator``, so that
models judged against one baseline are comparable; the baseline itself has no score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answers import AnswerFormat, Table, find, key_of
from rankalign.data.formats.common import instruction_text, prompt_text
from rankalign.data.formats.kept import lost_details, note_of
from rankalign.data.records import CandidateSet, Checker, Prompt, Response


def win_probability(preference: float | None) -> float | None:
    """AlpacaEval's ``preference`` as the probability that ``generator_2`` wins; None where the judge gave none.

    1 is the first output, 2 the second, 0 and 1.5 draws, and what lies between them weights.

    Raises:
        ValueError: the number is none of these.
    """
    if preference is None:
        return None
    if preference and not 1 <= preference <= 2:
        raise ValueError(f"a preference is 0, null, or a number from 1 to 2, not {preference}")
    return preference - 1 if preference else 0.5


@dataclass(frozen=True)
class AlpacaEval(AnswerFormat):
    """Prompts are told apart by ``prompt_id``, or by the instruction where there is none."""

    name = "alpaca-eval"
    reads = frozenset(
        {"instruction", "input", "annotated", "preference", "annotator"}
        | {"raw_completion", "time_per_example", "price_per_example", "generator_1", "generator_2"}
    )

    def stage(self, row: dict[str, Any], check: Checker) -> int:
        """Outputs first, then what was said of them."""
        if "output" in row:
            return 1
        check.need(row, "preference")
        return 2

    def take(self, row: dict[str, Any], check: Checker, table: Table) -> None:
        """An output, an annotation, or a preference on outputs taken before."""
        key = _key(row, check)
        if "output" in row:
            self._take_output(row, check, table.at(key, check))
            return
        judge = check.text(check.need(row, "annotator"), "annotator", empty=False)
        policy = check.text(check.need(row, "generator_2"), "generator_2", empty=False)
        try:
            win = win_probability(None if row["preference"] is None else check.number(row["preference"], "preference"))
        except ValueError as error:
            raise check.fail("preference", str(error)) from None
        if "output_1" in row:
            self._take_sides(row, check, table.at(key, check))
        record = table.known(key, check, "verdicts")
        find(record, policy, check).scores[judge] = win
        if "output_1" in row:
            kept = {name: value for name, value in row.items() if name not in ("output_1", "output_2")}
            record.meta.setdefault(self.name, {}).setdefault("annotations", []).append(kept)

    def _take_output(self, row: dict[str, Any], check: Checker, record: CandidateSet) -> None:
        check.need(row, "instruction")
        parts = [check.text(row[name], name) for name in ("instruction", "input") if name in row]
        prompt = self._prompt(record, instruction_text(parts[0], "".join(parts[1:])), check)
        policy = check.text(check.need(row, "generator"), "generator", empty=False)
        kept = {name: value for name, value in row.items() if name not in ("output", "generator")}
        response = Response(check.text(row["output"], "output"), policy=policy, meta={self.name: kept})
        record.prompt = prompt
        record.responses.append(response)
        record.meta.setdefault(self.name, {})

    def _take_sides(self, row: dict[str, Any], check: Checker, record: CandidateSet) -> None:
        prompt = self._prompt(record, check.text(check.need(row, "instruction"), "instruction"), check)
        known, fresh = {response.policy: response.text for response in record.responses}, list[Response]()
        for side in ("1", "2"):
            policy = check.text(check.need(row, f"generator_{side}"), f"generator_{side}", empty=False)
            text = check.text(check.need(row, f"output_{side}"), f"output_{side}")
            if known.setdefault(policy, text) != text:
                raise check.fail(f"output_{side}", f"differs from another output of {policy!r} to this instruction")
            if all(response.policy != policy for response in [*record.responses, *fresh]):
                fresh.append(Response(text, policy=policy, meta={self.name: {"annotated": True}}))
        record.prompt = prompt
        record.responses += fresh

    def _prompt(self, record: CandidateSet, content: str, check: Checker) -> Prompt:
        prompt = check.prompt([{"role": "user", "content": content}], "instruction")
        if record.prompt and record.prompt != prompt:
            raise check.fail("instruction", f"differs from that of the same prompt {record.id!r}")
        return prompt

    def rows_of(self, record: CandidateSet, losses: Losses) -> Iterator[tuple[str, dict[str, Any]]]:
        """Outputs, and the annotations that brought outputs of their own; those in place of the outputs."""
        texts = {response.policy: response.text for response in record.responses}
        judges = set[str]()
        for kept in (note_of(record, self.name) or {}).get("annotations", []):
            judges.add(kept["annotator"])
            outputs = {f"output_{side}": texts[kept[f"generator_{side}"]] for side in ("1", "2")}
            yield kept["generator_2"], {**kept, **outputs}
        lost_details(record.responses, losses, judges, policy=False, meta=False)
        for response in record.responses:
            if not judges or not response.meta.get(self.name, {}).get("annotated"):
                yield response.policy, self.row(record, response, losses)

    def row(self, record: CandidateSet, response: Response, losses: Losses) -> dict[str, Any]:
        """A row of outputs."""
        kept = {name: value for name, value in response.meta.get(self.name, {}).items() if name != "annotated"}
        if "instruction" not in kept:
            kept["instruction"] = prompt_text(record.prompt, losses if note_of(record, self.name) is None else Losses())
        return {**kept, "output": response.text, "generator": response.policy}


def _key(row: dict[str, Any], check: Checker) -> str:
    if "prompt_id" in row:
        return key_of(row, "prompt_id", check)
    instruction = check.text(check.need(row, "instruction"), "instruction", empty="input" in row)
    return instruction_text(instruction, check.text(row.get("input", ""), "input"))


FORMAT = AlpacaEval()
