"""What the columns of a table are: as ``--columns`` says it, or by their usual names."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from rankalign.errors import InputError
from rankalign.registry import did_you_mean

SCORE = "score"
"""Name of the judge where the table calls its scores nothing in particular."""

# What columns are called that hold one of these, in lower case and with underscores.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "user_prompt"),
    "response": ("response", "answer", "completion", "output", "reply", "generation", "text"),
    "score": ("score", "rating", "reward", "stars", "grade"),
    "policy": ("policy", "model", "generator", "model_name"),
    "judge": ("judge", "annotator", "rater", "reviewer"),
    "id": ("id", "prompt_id", "question_id"),
    "system": ("system", "system_prompt"),
}
_OWN = ("id", "prompt", "policy", "text", "finished")


@dataclass(frozen=True)
class Layout:
    """What each column of a table is.

    Attributes:
        prompt: the column of the prompt.
        responses: the answers' columns: one where each answer has a row, several where a prompt has one.
        scores: columns by judge, one an answer column.
        policies: columns with who answered, one an answer column; empty: the answers' columns are called as they are.
        judge: long tables: the column with who scored, in the place of a judge's name.
        id: the column with the prompt's id.
        system: the column with the system message.
        meta: columns to keep in ``meta``.
        wide: whether a row holds all answers of its prompt, and not one.
        own: whether this is a sheet of records that we wrote.
    """

    prompt: str = ""
    responses: tuple[str, ...] = ()
    scores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    judge: str = ""
    id: str = ""
    system: str = ""
    meta: tuple[str, ...] = ()
    wide: bool = False
    own: bool = False

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are read."""
        scores = (name for names in self.scores.values() for name in names)
        single = (self.prompt, self.judge, self.id, self.system)
        return tuple(filter(None, (*single, *self.responses, *scores, *self.policies, *self.meta)))


def parse_columns(text: str) -> Layout:
    """What ``--columns`` says.

    ``prompt=``, ``id=``, ``system=``, ``judge=`` name a column; ``response=``, ``policy=`` and ``score=`` (or
    ``score:JUDGE=``) one each where every answer has a row; ``responses=A|B|C``, ``policies=`` and ``scores=`` (or
    ``scores:JUDGE=``) as many as there are answers in a row; ``meta=A|B`` what is to be kept. A name with a comma in it
    goes into double quotes together with its key: ``"prompt=What, then?"``.

    Raises:
        InputError: an unknown key, one that stands twice, or numbers of columns that do not match.
    """
    given: dict[str, tuple[str, ...]] = {}
    for part in next(csv.reader([text], skipinitialspace=True), []):
        key, equals, value = (word.strip() for word in part.partition("="))
        names = tuple(name.strip() for name in value.split("|"))
        kind, _, judge = key.partition(":")
        single = _SINGULAR.get(kind, kind)
        if not equals or "" in names or single not in (*NAMES, "meta") or (judge and single != "score"):
            known = did_you_mean(kind, [*NAMES, *_SINGULAR, "meta"])
            raise InputError(f"--columns: cannot read {part!r}; write KEY=COLUMN with commas between{known}")
        full = f"score:{judge or SCORE}" if single == "score" else single
        if full in given or (len(names) > 1 and single in ("prompt", "id", "system", "judge")):
            raise InputError(f"--columns: {key} names one column, and stands once")
        given[full] = names
        given |= {"wide": ()} if kind in _SINGULAR else {}
    return _laid_out(given)


_SINGULAR = {"responses": "response", "scores": "score", "policies": "policy"}


def _laid_out(given: dict[str, tuple[str, ...]]) -> Layout:
    if "prompt" not in given:
        raise InputError("--columns: name the prompt's column with prompt=COLUMN")
    responses = given.get("response", ())
    scores = {key.removeprefix("score:"): names for key, names in given.items() if key.startswith("score:")}
    policies = given.get("policy", ())
    for what, names in {
        **{f"scores of {judge}": names for judge, names in scores.items()},
        "policies": policies,
    }.items():
        if names and len(names) != len(responses):
            raise InputError(f"--columns: {len(names)} columns of {what} for {len(responses)} of answers")
    one = {key: given.get(key, ("",))[0] for key in ("prompt", "judge", "id", "system")}
    wide = "wide" in given or len(responses) > 1
    if one["judge"] and (wide or set(scores) != {SCORE}):
        raise InputError("--columns: judge= says who gave score=, in tables with one answer a row")
    named = Layout(one["prompt"], judge=one["judge"], id=one["id"], system=one["system"], wide=wide)
    return replace(named, responses=responses, scores=scores, policies=policies, meta=given.get("meta", ()))


def recognise(columns: Iterable[str]) -> Layout:
    """What columns are by their usual names; what is not found stays empty.

    Raises:
        InputError: two columns could be the prompt, the answer, who answered, ...
    """
    names = list(columns)
    own = set(_OWN) <= set(names)
    found: dict[str, str] = {}
    for role, usual in NAMES.items():
        fits = [name for name in names if name.strip().lower().replace(" ", "_") in usual]
        if own and role in ("id", "prompt", "policy"):
            fits = [role]
        elif own:
            fits = ["text"] if role == "response" else []
        if len(fits) > 1:
            raise InputError(
                f"the columns {' and '.join(map(repr, fits))} could both be the {role}; say with --columns"
            )
        found[role] = fits[0] if fits else ""
    score, response, policy = (found.pop(role) for role in ("score", "response", "policy"))
    scores = {name.removeprefix("score:"): (name,) for name in names if name.startswith("score:")}
    scores |= {SCORE: (score,)} if score else {}
    found["judge"] = found["judge"] if list(scores) == [SCORE] else ""
    named = Layout(found["prompt"], judge=found["judge"], id=found["id"], system=found["system"], own=own)
    responses, policies = ((column,) if column else () for column in (response, policy))
    return replace(named, responses=responses, scores=scores, policies=policies)


def fits(columns: Iterable[str]) -> bool:
    """Whether the usual names of a prompt and an answer are among the columns, and nothing that other formats read."""
    names = list(columns)
    try:
        layout = recognise(names)
    except InputError:
        return False
    return bool(layout.prompt and layout.responses) and not {"chosen", "rejected", "input"} & {n.lower() for n in names}


def told(layout: Layout) -> str:
    """What was taken for what, for people."""
    parts = [f"prompt from {layout.prompt!r}", f"answers from {', '.join(map(repr, layout.responses))}"]
    parts += [f"scores from {', '.join(map(repr, names))}" for names in layout.scores.values()]
    named = {"policy": layout.policies[0] if layout.policies else "", "who scored": layout.judge}
    named |= {"id": layout.id, "system message": layout.system}
    return ", ".join(parts + [f"{what} from {name!r}" for what, name in named.items() if name])
