"""IFEval (Zhou et al. 2023, arXiv:2311.07911): which instructions of a prompt were followed, strictly and loosely."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError
from rankalign.evaluation.statistics import Estimate, mean_interval, ratio_interval
from rankalign.evaluation.suites import Asked, SuiteResult, doubles, once, rows_of
from rankalign.evaluation.suites.if_checks import CHECKS, detects_languages, variants
from rankalign.evaluation.tables import Table, interval, some
from rankalign.registry import did_you_mean

MODES = ("strict", "loose")
RELATIONS = ("less than", "at least")


@dataclass(frozen=True)
class Question:
    """A prompt with its instructions, each a name of :data:`CHECKS` and its arguments."""

    prompt: str
    instructions: tuple[tuple[str, dict[str, Any]], ...]


def read_questions(path: str) -> dict[str, Question]:
    """Prompts with their instructions: rows of ``key``, ``prompt``, ``instruction_id_list`` and ``kwargs``.

    Raises:
        RecordError: a row is broken, an instruction is not known or lacks an argument.
    """
    found: dict[str, Question] = {}
    for check, row in rows_of([path]):
        question = _question(check, row)
        once(found, question.prompt, question, check, "prompt")
    return found


def _question(check: Checker, row: dict[str, Any]) -> Question:
    names = check.array(check.need(row, "instruction_id_list"), "instruction_id_list", at_least=1)
    told = check.array(check.need(row, "kwargs"), "kwargs")
    if len(told) != len(names):
        raise check.fail("kwargs", f"expected {len(names)} entries, one an instruction, found {len(told)}")
    instructions = []
    for number, (name, given) in enumerate(zip(names, told, strict=True)):
        if name not in CHECKS:
            place = f"instruction_id_list[{number}]"
            raise check.fail(place, f"{name!r} is not known{did_you_mean(str(name), CHECKS)}")
        kwargs = {key: value for key, value in check.mapping(given, f"kwargs[{number}]").items() if value is not None}
        wanted = list(inspect.signature(CHECKS[name]).parameters)[1:]
        if lacking := [key for key in wanted if key not in kwargs]:
            raise check.fail(f"kwargs[{number}].{lacking[0]}", f"is missing: {name} needs it")
        instructions.append((str(name), {key: _argument(check, name, key, kwargs[key], number) for key in wanted}))
    return Question(check.text(check.need(row, "prompt"), "prompt", empty=False), tuple(instructions))


def _argument(check: Checker, name: str, key: str, value: Any, number: int) -> Any:
    """An argument of the type that the check takes."""
    place, kind = f"kwargs[{number}].{key}", inspect.signature(CHECKS[name]).parameters[key].annotation
    if kind == "int":
        if not float(check.number(value, place)).is_integer():
            raise check.fail(place, f"expected a whole number, found {value!r}")
        return int(value)
    if kind == "Sequence[str]":
        return [check.text(each, f"{place}[{k}]", empty=False) for k, each in enumerate(check.array(value, place))]
    text = check.text(value, place, empty=False)
    if key.endswith("relation") and text not in RELATIONS:
        raise check.fail(place, f"expected {' or '.join(RELATIONS)}, found {text!r}")
    return text


def followed(question: Question, answer: str, loose: bool) -> list[bool | None]:
    """For each instruction whether the answer follows it; None where nothing here can tell.

    An empty answer follows nothing. ``loose`` takes the best of :func:`variants`.
    """
    texts = [text for text in (variants(answer) if loose else [answer]) if text.strip()]
    found: list[bool | None] = []
    for name, kwargs in question.instructions:
        told = [CHECKS[name](text, **kwargs) for text in texts]
        found.append(True if True in told else None if None in told else False)
    return found


def evaluate(asked: Asked) -> SuiteResult:
    """Accuracy by prompt (all instructions followed) and by instruction, strict and loose, and by kind.

    Prompts with an instruction that nothing here can check are left out, and counted by name.
    """
    if not asked.questions:
        raise InputError("suite 'ifeval' needs --questions: rows of prompt, instruction_id_list and kwargs")
    questions = read_questions(asked.questions)
    answers: dict[str, str] = {}
    twice = 0
    for check, row in rows_of(asked.files):
        prompt = check.text(check.need(row, "prompt"), "prompt")
        twice += not once(answers, prompt, check.text(check.need(row, "response"), "response"), check, "prompt")
    unknown = [prompt for prompt in answers if prompt not in questions]
    missing = [prompt for prompt in questions if prompt not in answers]
    own = [questions[prompt] for prompt in answers if prompt in questions]
    if not own:
        raise InputError("not one answer is to a prompt of the questions; prompts must be equal to the sign")
    told = {mode: [followed(q, answers[q.prompt], mode == "loose") for q in own] for mode in MODES}
    kept = [k for k in range(len(own)) if all(None not in told[mode][k] for mode in MODES)]
    if not kept:
        raise InputError("every prompt has an instruction about a language: pip install 'rankalign[suites]'")
    remarks = doubles(twice)
    remarks += (
        [f"{len(missing)} of {len(questions)} prompts have no answer: {some(_short(missing))}"] if missing else []
    )
    remarks += [f"{len(unknown)} answers are to no prompt of the questions: {some(_short(unknown))}"] if unknown else []
    if len(kept) < len(own):
        left = len(own) - len(kept)
        remarks.append(f"{left} prompts ask for a language, which is not checked without the package langdetect")
    cased = [q for q in own if any(name.startswith("change_case:english") for name, _ in q.instructions)]
    if cased and not detects_languages():
        remarks.append(f"{len(cased)} prompts ask for English in one case: only the case is checked without langdetect")
    remarks.append("sentences are counted by our own rule, words in capitals by the word: published figures use NLTK's")
    return _result([own[k] for k in kept], {m: [told[m][k] for k in kept] for m in MODES}, remarks, asked.seed)


def _short(prompts: Sequence[str]) -> list[str]:
    return [prompt if len(prompt) <= 40 else prompt[:40] + "..." for prompt in prompts]


def _result(
    own: Sequence[Question], told: dict[str, list[list[bool | None]]], remarks: list[str], seed: int
) -> SuiteResult:
    found: dict[str, Estimate] = {}
    for mode in MODES:
        found[f"prompt {mode}"] = mean_interval([float(all(each)) for each in told[mode]], seed=seed)
        right, count = [float(sum(map(bool, each))) for each in told[mode]], [float(len(each)) for each in told[mode]]
        found[f"instruction {mode}"] = ratio_interval(right, count, seed=seed)
    metrics = {name: estimate.value for name, estimate in found.items()}
    kinds: dict[str, list[list[bool | None]]] = {}
    for k, question in enumerate(own):
        for i, (name, _) in enumerate(question.instructions):
            kinds.setdefault(name, []).append([told[mode][k][i] for mode in MODES])
    by_kind = [
        [name, *(100 * sum(bool(pair[m]) for pair in kinds[name]) / len(kinds[name]) for m in (0, 1)), len(kinds[name])]
        for name in CHECKS
        if name in kinds
    ]
    rows = [[name, 100 * e.value, interval([100 * bound for bound in e.interval])] for name, e in found.items()]
    tables = [
        Table("IFEval", ["", "percent", "95 % interval"], rows, f"n = {len(own)} prompts; intervals resample prompts"),
        Table("IFEval by instruction", ["instruction", "strict", "loose", "n"], by_kind, "percent"),
    ]
    return SuiteResult(metrics, len(own), {name: e.interval for name, e in found.items()}, tables, remarks)
