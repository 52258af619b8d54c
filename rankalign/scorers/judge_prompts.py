"""Prompts for judges, read from data: our own, and FastChat's ``judge_prompts.jsonl`` of both generations.

A file has one prompt a line: ``name``, ``type`` (``single``, ``pairwise``, ``listwise``), ``system_prompt``,
``prompt_template``, ``output_format`` and, where the verdict has axes, ``axes`` (what each means, by name). A template
may hold ``{question}``, ``{answer}``, ``{answer_a}``, ``{answer_b}``, ``{answers}`` (a paragraph each), ``{responses}``
(in one line, ``Response 1: ... Response 2: ...``), ``{reference}`` (FastChat's ``{ref_answer_1}``), ``{axes}`` and
``{form}``. Prompts of type ``rubric`` and ``checklist`` have no axes of their own: the criteria of the record take
their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankalign.data.records import Checker
from rankalign.errors import InputError, RecordError
from rankalign.registry import did_you_mean
from rankalign.scorers import verdicts
from rankalign.scorers.verdicts import Ratings, Scores
from rankalign.storage.jsonl import read_rows

SHIPPED = Path(__file__).with_name("judge_prompts.jsonl")
TYPES = {
    "pointwise": "single",
    "pairwise": "pairwise",
    "listwise": "listwise",
    "reference": "single",
    "rubric": "rubric",
    "checklist": "checklist",
}
"""The type of prompt that a mode asks with."""
PLACES = {
    "single": {"question", "answer", "reference", "axes", "form"},
    "pairwise": {"question", "answer_a", "answer_b", "reference", "form"},
    "listwise": {"question", "answers", "responses", "reference", "axes", "form"},
    "rubric": {"question", "answer", "reference", "axes", "form"},
    "checklist": {"question", "answer", "reference", "axes", "form"},
}
OF_RECORDS = ("rubric", "checklist")
"""Types whose axes are the criteria of each record."""
# What a verdict looks like, by output format, for {form} and for the request to repeat it.
FORMS = {
    "axes": "Verdict: {axes}",
    "grid": "Response 1: {axes}\n(one such line for each response, in their order)",
    "order": "Verdict: the numbers of the answers, best first, with > between them, or = between equally good ones",
    "[[rating]]": "[[N]] with N from 1 to 10",
    "[[A]]": "[[A]] if answer A is better, [[B]] if answer B is better, [[C]] for a tie",
    "[[rating_a,rating_b]]": "[[N,M]] with the scores of A and B, each from 1 to 10",
    "items": "Verdict: {axes}",
    "two scores": "N M, the scores of 1 and 2, each from 1 to 10, with a blank between them",
}
FORMATS = {
    "single": ("axes", "[[rating]]"),
    "pairwise": ("[[A]]", "[[rating_a,rating_b]]", "two scores"),
    "listwise": ("order", "grid"),
    "rubric": ("axes",),
    "checklist": ("items",),
}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """One way to ask a judge.

    Attributes:
        name: its name in the file.
        type: ``single``, ``pairwise``, ``listwise``, ``rubric`` or ``checklist``.
        system: the system message, or empty.
        template: the user message.
        output: how the verdict is written, a key of :data:`FORMS`.
        axes: what is graded and what that means; only for ``axes``, ``grid`` and ``items``.
    """

    name: str
    type: str
    system: str
    template: str
    output: str
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def additive(self) -> bool:
        """Whether the verdict grades each answer by itself, so that its numbers are summed and not aggregated."""
        return self.output in ("axes", "grid", "items", "[[rating]]")

    @property
    def shows_reference(self) -> bool:
        """Whether the judge sees a reference answer."""
        return "{reference}" in self.template

    @property
    def form(self) -> str:
        """What the verdict has to look like, in words for the judge."""
        value = "yes or no" if self.output == "items" else "N"
        return FORMS[self.output].replace("{axes}", ", ".join(f"{axis}={value}" for axis in self.axes))

    def fill(self, values: Mapping[str, str]) -> str:
        """The user message with its places filled; what is filled in is not read again."""
        known = {**values, "axes": "\n".join(f"- {k}: {v}" for k, v in self.axes.items()), "form": self.form}
        return _PLACE.sub(lambda place: known[place[1]], self.template)

    def read(self, text: str, count: int) -> list[Ratings] | None:
        """The verdict at the end of the judge's text: for each answer shown its numbers by name, or None.

        The names are the axes, ``rating``, ``points`` (1, 0, or a half for a tie) or ``rank`` (1 is best).
        """
        if self.output == "axes":
            ratings = verdicts.parse_axes(text, list(self.axes))
            return None if ratings is None else [ratings]
        if self.output == "items":
            answers = verdicts.parse_items(text, list(self.axes))
            return None if answers is None else [answers]
        if self.output == "grid":
            return verdicts.parse_grid(text, count, list(self.axes))
        if self.output == "order":
            ranks = verdicts.parse_order(text, count)
            return None if ranks is None else [{"rank": rank} for rank in ranks]
        if self.output == "[[rating]]":
            rating = verdicts.parse_rating(text)
            return None if rating is None else [{"rating": rating}]
        name = "points" if self.output == "[[A]]" else "rating"
        scores = self._two(text)
        return None if scores is None else [{name: score} for score in scores]

    def _two(self, text: str) -> Scores | None:
        if self.output == "[[A]]":
            return verdicts.parse_letter(text)
        if self.output == "[[rating_a,rating_b]]":
            return verdicts.parse_ratings(text)
        return verdicts.in_range(verdicts.parse_strict(text))

    def with_axes(self, axes: Sequence[str] | Mapping[str, str]) -> JudgePrompt:
        """The prompt with some of its axes, or with others.

        Args:
            axes: names of its own axes, or meanings by name.

        Raises:
            InputError: its verdict has no axes, or none of that name.
        """
        if self.type in OF_RECORDS:
            raise InputError("axes: these come from each record; leave them out")
        if self.output not in ("axes", "grid"):
            raise InputError(f"axes: prompt {self.name!r} asks for {self.output}, which has no axes")
        if not axes or not isinstance(axes, Mapping | list | tuple):
            raise InputError("axes: write a list of names, or a mapping from names to what they mean")
        for axis in axes:
            if not isinstance(axes, Mapping) and axis not in self.axes:
                raise InputError(f"axes: prompt {self.name!r} has no axis {axis!r}{did_you_mean(axis, self.axes)}")
        own = axes if isinstance(axes, Mapping) else {axis: self.axes[axis] for axis in axes}
        return replace(self, axes={str(axis): str(meaning) for axis, meaning in own.items()})


def read_prompts(path: str | Path) -> list[JudgePrompt]:
    """All prompts of a file; FastChat's lines that are settings of a reviewer are passed over.

    Raises:
        RecordError: a line is no prompt, or its template asks for what a record does not have.
    """
    return [_prompt(check, row) for check, row in _lines(path)]


def _prompt(check: Checker, row: dict[str, Any]) -> JudgePrompt:
    row = _first_generation(check, row) if "prompt_id" in row else row
    kind = check.text(check.need(row, "type"), "type")
    output = check.text(check.need(row, "output_format"), "output_format")
    if output not in FORMATS.get(kind, ()):
        known = "; ".join(f"{kind}: {', '.join(formats)}" for kind, formats in FORMATS.items())
        raise check.fail("output_format", f"type {kind!r} with verdict {output!r} is not known ({known})")
    return JudgePrompt(
        name=check.text(check.need(row, "name"), "name", empty=False),
        type=kind,
        system=check.text(row.get("system_prompt", ""), "system_prompt"),
        template=_template(check, check.text(check.need(row, "prompt_template"), "prompt_template", empty=False), kind),
        output=output,
        axes={} if kind in OF_RECORDS else _axes(check, row, output),
    )


def _template(check: Checker, template: str, kind: str) -> str:
    template = template.replace("{ref_answer_1}", "{reference}")
    for place in _PLACE.findall(template):
        if place not in PLACES[kind]:
            known = ", ".join(f"{{{name}}}" for name in sorted(PLACES[kind]))
            raise check.fail("prompt_template", f"asks for {{{place}}}; a {kind} prompt has {known}")
    return template


def _axes(check: Checker, row: dict[str, Any], output: str) -> dict[str, str]:
    if output not in ("axes", "grid"):
        return {}
    axes = check.mapping(check.need(row, "axes"), "axes")
    return {axis: check.text(meaning, f"axes.{axis}") for axis, meaning in axes.items()}


def _first_generation(check: Checker, row: dict[str, Any]) -> dict[str, Any]:
    """A line of FastChat 0.2 as one of today: the two scores come on the first line."""
    template = check.text(check.need(row, "prompt_template"), "prompt_template")
    for name, text in check.mapping(row.get("defaults", {}), "defaults").items():
        template = template.replace(f"{{{name}}}", check.text(text, f"defaults.{name}"))
    template = template.replace("{answer_1}", "{answer_a}").replace("{answer_2}", "{answer_b}")
    return {**row, "name": _name(row), "type": "pairwise", "output_format": "two scores", "prompt_template": template}


def find_prompt(spec: str, mode: str) -> JudgePrompt:
    """The prompt a judge is asked with.

    Args:
        spec: name of a shipped prompt, ``file.jsonl:name``, or a file that has one prompt for the mode; empty takes the
            first shipped one for the mode.
        mode: a key of :data:`TYPES`.

    Raises:
        InputError: no such prompt, or several.
    """
    spec = spec or ("reference" if mode == "reference" else "")
    path, name = _where(spec)
    lines = list(_lines(path))
    names = [_name(row) for _, row in lines]
    if name and name not in names:
        raise InputError(f"prompt: {path} has no {name!r}{did_you_mean(name, names)}")
    prompts, broken = [], list[RecordError]()
    for check, row in lines:
        if name in ("", _name(row)):  # other lines of a file, FastChat's for two turns say, may ask for what we lack
            try:
                prompts.append(_prompt(check, row))
            except RecordError as error:
                broken.append(error)
    fitting = [prompt for prompt in prompts if prompt.type == TYPES[mode]]
    if spec and len(fitting) != 1:
        if broken and not fitting:
            raise broken[0]
        found = ", ".join(prompt.name for prompt in fitting) or "none"
        raise InputError(f"prompt: mode {mode} needs one of type {TYPES[mode]}, {spec} has {found}; write FILE:NAME")
    if mode == "reference" and not fitting[0].shows_reference:
        raise InputError(f"prompt: {fitting[0].name!r} has no place {{reference}}, which mode reference is about")
    return fitting[0]


def _lines(path: str | Path) -> Iterator[tuple[Checker, dict[str, Any]]]:
    """The prompts of a file, unread; FastChat's settings of reviewers are passed over."""
    return ((Checker(path, line), row) for line, row in read_rows(path) if "reviewer_id" not in row)


def _name(row: dict[str, Any]) -> str:
    """A prompt's name; in FastChat 0.2 its category or number."""
    return str(row.get("category") or row["prompt_id"]) if "prompt_id" in row else str(row.get("name", ""))


def _where(spec: str) -> tuple[Path, str]:
    """File and name behind a ``prompt`` option."""
    if Path(spec).suffix == ".jsonl":
        return Path(spec), ""
    path, colon, name = spec.rpartition(":")
    return (Path(path), name) if colon else (SHIPPED, spec)
