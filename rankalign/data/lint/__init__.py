"""What is wrong with a preference data set, before anything is trained on it.

A finding is a suspicion with a place, not an error, and :func:`fix` mends only what has one right repair. The rules are
in :mod:`rankalign.data.lint.rules`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rankalign.data.lint.rules import RULES, control_rules, without_bos, without_eos
from rankalign.data.lint.whole import Baseline, Longest, Watch, prompt_keys
from rankalign.data.records import CandidateSet, Response

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
        totals: how many findings there are by code, where only the first ones were kept.
    """

    records: int
    findings: dict[str, list[Finding]]
    longest: dict[str, Baseline] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Findings by code."""
        return dict(self.totals)


def lint(
    sets: Iterable[CandidateSet],
    held_out: Iterable[CandidateSet] = (),
    control: Sequence[str] = (),
    most: int | None = None,
    asked: Mapping[str, Watch] | None = None,
) -> LintReport:
    """Look at every record with every rule, once through.

    Args:
        sets: the records.
        held_out: records of a test split; a prompt that stands in both is a finding.
        control: a tokenizer's control tokens, to look for beside the published ones.
        asked: what looks for L405 (:class:`rankalign.data.lint.whole.NearlySame`) and L406 (``Leaked``), if wished.
        most: findings of each code to keep, the first ones; all of them are counted. None keeps all.
    """
    rules, test = RULES | {rule.code: rule for rule in control_rules(control)}, prompt_keys(held_out)
    watches = {code: rule.whole(test) for code, rule in rules.items() if rule.whole is not None}
    watches |= asked or {}
    checks = {code: rule.record for code, rule in rules.items() if rule.record is not None}
    found: dict[str, list[Finding]] = {code: [] for code in rules}
    totals, records, longest = Counter[str](), 0, Longest()

    def note(code: str, record: str, response: int | None, message: str) -> None:
        totals[code] += 1
        if most is None or len(found[code]) < most:
            found[code].append(Finding(code, record, response, message))

    for record in sets:
        records += 1
        longest.see(record)
        for code, check in checks.items():
            for index, message in check(record):
                note(code, record.id, index, message)
        for code, watch in watches.items():
            for ident, message in watch.see(record):
                note(code, ident, None, message)
    for code, watch in watches.items():
        for ident, message in watch.end():
            note(code, ident, None, message)
    kept = {code: findings for code, findings in found.items() if findings}
    return LintReport(records, kept, longest.baselines(), {code: totals[code] for code in kept})


def fix(sets: Iterable[CandidateSet]) -> tuple[list[CandidateSet], dict[str, int]]:
    """Mended copies of the records, and how often each fixable rule was applied; see :func:`mend`."""
    done = Counter[str]()
    return list(mend(sets, done)), dict(done)


def mend(sets: Iterable[CandidateSet], done: Counter[str]) -> Iterator[CandidateSet]:
    """Mended copies of the records as they pass, each repair counted in ``done`` by its rule.

    Marks of a text's begin and end are cut off (training adds the tokens), and equal answers of one policy with equal
    scores become one with their counts added. Nothing is dropped.
    """
    for record in sets:
        responses = [_stripped(response, done) for response in record.responses]
        prompt = record.prompt
        if isinstance(prompt, str) and (bare := without_bos(prompt)) != prompt and bare.strip():
            prompt, done["L106"] = bare, done["L106"] + 1
        yield CandidateSet(record.id, prompt, _merged(responses, done), record.meta)


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
