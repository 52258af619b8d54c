"""HALOs: samples, and the binary, pairwise and scalar feedback made of them; ``type`` says which a row is.

Consecutive samples of one prompt become one record, so that a list of candidates stays a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rankalign.data.formats import Losses
from rankalign.data.formats.answered import answered, spelt
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.kept import complete, keep, lost_details, note_of
from rankalign.data.formats.ranking import pick_judge
from rankalign.data.formats.unread import unread
from rankalign.data.records import PREFERENCE, CandidateSet, Checker, Response
from rankalign.data.templates import as_messages
from rankalign.storage.jsonl import kind

SAMPLES = ("sample", "scalar_feedback")


@dataclass(frozen=True)
class Halos(RowFormat):
    """Rewards are judge ``reward``, labels judge ``label`` (binary) or ``preference`` (pairwise: 1 says A)."""

    name = "halos"
    id_columns = ("prompt_id",)
    reads = frozenset({"label", "reward_A", "reward_B", "reward_difference", "sample_id", "type", "text"})

    def unread(self, record: CandidateSet) -> list[str]:
        """The columns of all samples, or of the feedback, that nothing was made of."""
        rows: dict[str, Any] = {}
        for response in record.responses:
            rows |= response.meta.get("halos", {})
        return [*super().unread(record), *unread(rows, self.reads)]

    def joins(self, pending: CandidateSet, record: CandidateSet) -> bool:
        """Samples of one prompt, one behind the other."""
        first, own = (each.responses[0].meta.get("halos", {}) for each in (pending, record))
        samples = all((note_of(each, self.name) or {}).get("type") in SAMPLES for each in (pending, record))
        same = "prompt_id" in own and own["prompt_id"] == first.get("prompt_id")
        return samples and same and record.prompt == pending.prompt

    def record(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        """One row."""
        prompt, sort = check.prompt(check.need(row, "prompt")), row.get("type", "sample")
        if sort == "pairwise_feedback":
            return self._read_pair(row, check)
        if sort not in (*SAMPLES, "binary_feedback"):
            raise check.fail("type", f"unknown type {sort!r}")
        response = answered(check, check.need(row, "output"), "output")
        named = isinstance(row.get("generator"), str) and bool(row["generator"].strip())
        response.policy = row["generator"] if named else "unknown"
        if "reward" in row:
            response.scores["reward"] = check.number(row["reward"], "reward")
        if sort == "binary_feedback":
            response.scores["label"] = _label(row, check)
            note = {"type": sort, "text": isinstance(row["output"], str)}
            used = ["prompt", "output", "reward", "label", "type", *(["generator"] if named else [])]
            return CandidateSet("", prompt, [response], keep(self.name, note, row, used))
        if "text" in row:  # the name under which is kept how the output was spelt
            raise check.fail("text", "samples have no such column; --ignore_columns text goes on without it")
        kept = {key: value for key, value in row.items() if key not in ("prompt", "output", "reward")}
        response.meta["halos"] = kept | {"text": isinstance(row["output"], str)}
        return CandidateSet("", prompt, [response], {self.name: {"type": sort}})

    def _read_pair(self, row: dict[str, Any], check: Checker) -> CandidateSet:
        label, responses = _label(row, check), []
        for side, score in (("A", label), ("B", 1 - label)):
            output, reward = f"output_{side}", f"reward_{side}"
            scores = {PREFERENCE: score} | ({"reward": check.number(row[reward], reward)} if reward in row else {})
            responses.append(answered(check, check.need(row, output), output, policy=side, scores=scores))
        if isinstance(row["output_A"], str) != isinstance(row["output_B"], str):
            raise check.fail("output_B", f"is {kind(row['output_B'])} where output_A is {kind(row['output_A'])}")
        note = {"type": "pairwise_feedback", "text": isinstance(row["output_A"], str)}
        meta = keep(self.name, note, row, ("prompt", "output_A", "output_B", "label", "type"))
        return CandidateSet("", row["prompt"], responses, meta)

    def rows(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        """Feedback as it came; else one sample for each response, with its reward where it has one."""
        note = note_of(record, self.name) or {}
        policies = [response.policy for response in record.responses]
        held = (PREFERENCE, "label", "reward")
        if note.get("type") == "pairwise_feedback" and policies == ["A", "B"]:
            lost_details(record.responses, losses, held, policy=False, meta=False, messages=False)
            outputs = {f"output_{r.policy}": _output(r, note["text"]) for r in record.responses}
            label = int(record.responses[0].scores.get(PREFERENCE) == 1)
            row = {"prompt": record.prompt, **outputs, "label": label, "type": note["type"]}
            yield complete(row, record, self.name, losses)
        elif note.get("type") == "binary_feedback" and len(record.responses) == 1:
            lost_details(record.responses, losses, held, policy=False, meta=False, messages=False)
            (response,) = record.responses
            row = {"prompt": record.prompt, "output": _output(response, note["text"]), "type": note["type"]}
            row |= {"label": int(response.scores.get("label") == 1)}
            row |= {"generator": response.policy} if response.policy != "unknown" else {}
            row |= {"reward": response.scores["reward"]} if "reward" in response.scores else {}
            yield complete(row, record, self.name, losses)
        else:
            yield from self._samples(record, losses)

    def _samples(self, record: CandidateSet, losses: Losses) -> Iterator[dict[str, Any]]:
        own = note_of(record, self.name) is not None
        judge = "reward" if own and not self.judge else pick_judge(record, self.judge) or ""
        lost_details(record.responses, losses, [judge], policy=False, meta=False, messages=False)
        for index, response in enumerate(record.responses):
            came, kept = "halos" in response.meta, dict(response.meta.get("halos", {}))
            text = kept.pop("text", False)
            made = {"prompt_id": record.id, "sample_id": index, "generator": response.policy}
            row = {
                "prompt": record.prompt if came else as_messages(record.prompt),
                "output": _output(response, text),
                **(kept if came else made),
            }
            score = response.scores.get(judge)
            row |= {} if score is None else {"reward": score}
            if not came:
                row["type"] = "sample" if score is None else "scalar_feedback"
            yield row
        if any(key != self.name for key in record.meta) or (note_of(record, self.name) or {}).get("columns"):
            losses.add("meta of a prompt with several samples")


def _label(row: dict[str, Any], check: Checker) -> float:
    label = check.number(check.need(row, "label"), "label")
    if label not in (0, 1):
        raise check.fail("label", f"expected 0 or 1, found {label}")
    return label


def _output(response: Response, text: bool) -> Any:
    return spelt(response, text)


FORMAT = Halos()
