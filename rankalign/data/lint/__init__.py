"""What is wrong with a preference data set, before anything is trained on it.

A finding is a suspicion with a place, not an error, and :func:`fix` mends only what has one right repair. The rules are
in :mod:`rankalign.data.lint.rules`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rankalign.data.lint.rules import (
    RULES,
    Baseline,
    control_rules,
    longest_answer,
    prompt_key,
    without_bos,
    without_eos,
)
from rankalign.data.records import CandidateSet, Response, judges

__all__ = ["RULES", "Finding", "LintReport", "fix", "lint"]


@dataclass(frozen=True)
class Finding:
    """One suspicion.

    Attributes:
        code: the rule.
        record: id of the record, empty for the whole set.
        response: index of the response, None for the whole record.
        message: what was seen, in words.
    """

    code: str
    record: str
    response: int | None
    message: str


@dataclass
class LintReport:
    """What :func:`lint` found.

    Attributes:
        records: how many were looked at.
        findings: by code, in order of the records; a code without findings is not there.
        longest: the longest-answer baseline by judge.
    """

    records: int
    findings: dict[str, list[Finding]]
    longest: dict[str, Baseline] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Findings by code."""
        return {code: len(found) for code, found in self.findings.items()}


def lint(
    sets: Iterable[CandidateSet], held_out: Iterable[CandidateSet] = (), control: Sequence[str] = ()
) -> LintReport:
    """Look at every record with every rule.

    Args:
        sets: the records.
        held_out: records of a test split; a prompt that stands in both is a finding.
        control: a tokenizer's control tokens, to look for beside the published ones.
    """
    records, test = list(sets), frozenset(map(prompt_key, held_out))
    findings: dict[str, list[Finding]] = {}
    for code, rule in (RULES | {rule.code: rule for rule in control_rules(control)}).items():
        found: list[Finding] = []
        if rule.record is not None:
            for record in records:
                found += [Finding(code, record.id, index, message) for index, message in rule.record(record)]
        if rule.whole is not None:
            found += [Finding(code, record, None, message) for record, message in rule.whole(records, test)]
        if found:
            findings[code] = found
    return LintReport(len(records), findings, {judge: longest_answer(records, judge) for judge in judges(records)})


def fix(sets: Iterable[CandidateSet]) -> tuple[list[CandidateSet], dict[str, int]]:
    """Mended copies of the records, and how often each fixable rule was applied.

    Marks of a text's begin and end are cut off (training adds the tokens), and equal answers of one policy with equal
    scores become one with their counts added. Nothing is dropped.
    """
    done: Counter[str] = Counter()
    mended = []
    for record in sets:
        responses = [_stripped(response, done) for response in record.responses]
        prompt = record.prompt
        if isinstance(prompt, str) and (bare := without_bos(prompt)) != prompt and bare.strip():
            prompt, done["L106"] = bare, done["L106"] + 1
        mended.append(CandidateSet(record.id, prompt, _merged(responses, done), record.meta))
    return mended, dict(done)


def _stripped(response: Response, done: Counter[str]) -> Response:
    text = without_eos(response.text)
    done.update(["L105"] if text != response.text else [])
    bare = without_bos(text)
    done.update(["L106"] if bare != text else [])
    # Sampled tokens no longer spell a text that was cut.
    return response if bare == response.text else dataclasses.replace(response, text=bare, tokens=None)


def _merged(responses: list[Response], done: Counter[str]) -> list[Response]:
    kept: list[Response] = []
    for response in responses:
        twin = next((k for k, r in enumerate(kept) if _twins(r, response)), None)
        if twin is None:
            kept.append(response)
        else:
            kept[twin] = dataclasses.replace(kept[twin], count=kept[twin].count + response.count)
            done["L201"] += 1
    return kept


def _twins(one: Response, other: Response) -> bool:
    return (one.text, one.messages, one.policy, one.scores) == (other.text, other.messages, other.policy, other.scores)
