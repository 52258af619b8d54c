"""Settings of the table: rows are data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankalign.config import ScorerConfig
from rankalign.engines import Policy
from rankalign.errors import InputError
from rankalign.registry import did_you_mean

JUDGE = "reward"
"""Who grades with the function of that setting."""
KINDS = ("start", "best_of", "train", "iterate")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: of its folder, and what the claims call it.
        title: what the page calls it.
        kind: ``start`` (the start model), ``best_of`` (its best answer of those it draws), ``train`` or ``iterate``.
        policies: names of the policies whose answers it learns from.
        train: its own settings of ``rankalign train``.
        iterate: its own settings of ``rankalign iterate``.
    """

    name: str
    title: str
    kind: str = "train"
    policies: list[str] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    iterate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TableConfig:
    """Settings of ``rankalign table``.

    Attributes:
        output: folder of all units.
        prompts: records with the training prompts and the data set's answers.
        heldout: records with the prompts that nothing is trained on.
        reward: ``module:function`` that grades answers: candidates, PPO's rollouts and held-out answers alike.
        policies: who writes candidates; with ``model: default`` the start model does.
        rows: the table's rows.
        seeds: of sampling and training.
        graders: scorers of the held-out answers that nothing is trained on, a column each; finished units are graded
            too when one is added.
        dataset: policies whose answers stand for the data set's: they stay what they are while others are sampled anew.
        model: the start model.
        answer: how held-out prompts are answered: a policy's settings, at temperature 1, or the KL would be wrong.
        train: settings of ``rankalign train`` that all trained rows share.
        max_prompts: take the first so many training prompts; 0 takes all.
        max_heldout: take the first so many held-out prompts; 0 takes all.
        jobs: run so many seeds at a time, each with its share of the processors' cores.
        page: where to write the page; empty writes ``results.md`` into ``output``.
        overwrite: start over.
    """

    output: str
    prompts: str
    heldout: str
    reward: str
    policies: list[Policy]
    rows: list[Row]
    seeds: list[int]
    graders: list[ScorerConfig] = field(default_factory=list)
    dataset: list[str] = field(default_factory=list)
    model: str = "default"
    answer: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    max_prompts: int = 0
    max_heldout: int = 0
    jobs: int = 1
    page: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        names, policies = [row.name for row in self.rows], [policy.name for policy in self.policies]
        if not names or not self.seeds:
            raise InputError("rows and seeds: name at least one of each")
        graders = [grader.name for grader in self.graders]
        for what, given in (("row", names), ("policy", policies), ("seed", self.seeds), ("grader", graders)):
            if len(set(given)) < len(given):
                raise InputError(f"a {what} stands twice: {', '.join(map(str, given))}")
        for name in graders:
            if name == JUDGE or Path(name).name != name:
                raise InputError(f"graders: {name!r} cannot be a name: it is the reward's, or no part of a file's")
        if self.jobs < 1:
            raise InputError(f"jobs: {self.jobs} seeds at a time are none; give 1 or more")
        if self.answer.get("temperature", 1) != 1:
            raise InputError("answer: temperature must be 1, or its draws would not estimate the KL")
        for row in self.rows:
            self._check(row, policies)

    def in_order(self) -> list[Row]:
        """The rows as a seed runs them."""
        return sorted(self.rows, key=lambda row: row.kind == "best_of")  # which reads the start row's

    def _check(self, row: Row, policies: Sequence[str]) -> None:
        own = (*row.policies, *self.dataset)
        for name, known in ((row.kind, KINDS), *((policy, policies) for policy in own)):
            if name not in known:
                raise InputError(f"row {row.name!r}: unknown {name!r}{did_you_mean(name, known)}")
        if row.kind == "iterate" and not row.policies:
            raise InputError(f"row {row.name!r}: name its policies")
        if row.kind == "best_of" and not any(other.kind == "start" for other in self.rows):
            raise InputError(f"row {row.name!r} takes the start model's answers: the table needs a row of kind start")
