"""Two files of answers as a set: prompts that one side lacks, and what they count for."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rankalign.data.records import CandidateSet
from rankalign.data.spool import View
from rankalign.errors import InputError
from rankalign.evaluation.pairwise.scores import Comparison, System, match
from rankalign.evaluation.statistics import Interval, clopper_pearson, mean_interval, sign_test
from rankalign.evaluation.tables import some

CHOICES = ("error", "intersect", "loss")
Records = Sequence[CandidateSet]


@dataclass
class Missing:
    """Ids of the prompts that the first and the second file have no answer to, though the other has one."""

    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)

    def remarks(self, names: tuple[str, str], how: str) -> list[str]:
        """In words, with what was done about them."""
        done = {"intersect": "left out", "loss": "counted as lost, and in no sum"}[how]
        sides = zip(names, (self.first, self.second), strict=True)
        return [f"{name} has no answer to {len(ids)} prompts ({some(ids)}), {done}" for name, ids in sides if ids]


def settle(a: Records, b: Records, how: str = "error") -> tuple[Records, Records, Missing]:
    """The records of the prompts that both answered, and which prompts one of them did not.

    Args:
        a: records of the first system.
        b: records of the second.
        how: ``error`` refuses prompts that stand in one file only; ``intersect`` and ``loss`` take those that both
            answered, and :func:`forfeit` counts the rest as lost.

    Raises:
        InputError: the prompts do not match, or no prompt is left; a prompt that stands in a file twice always.
    """
    if how == "error":
        pairs = match(a, b)
        return pairs.first, pairs.second, Missing()
    answered = [{record.id for record in side if record.responses} for side in (a, b)]
    both = answered[0] & answered[1]
    pairs = match(*(_only(side, both) for side in (a, b)))
    if not len(pairs):
        raise InputError("no prompt was answered in both files")
    lacking = [
        [record.id for record in here if record.id in own - both] for here, own in ((b, answered[1]), (a, answered[0]))
    ]
    return pairs.first, pairs.second, Missing(*lacking)


def _only(sets: Records, ids: set[str]) -> Records:
    return View(sets, array("Q", (number for number, record in enumerate(sets) if record.id in ids)))


def forfeit(found: Comparison, missing: Missing, seed: int = 0) -> Comparison:
    """A comparison of two systems in which whoever has no answer has lost that prompt; sums and differences stay."""
    systems = [_forfeited(system, missing, seed) for system in found.systems]
    return replace(found, systems=systems)


def _forfeited(system: System, missing: Missing, seed: int) -> System:
    win, loss = system.win + len(missing.second), system.loss + len(missing.first)
    n, points = win + system.tie + loss, win + system.tie / 2
    rate = mean_interval([1.0] * win + [0.5] * system.tie + [0.0] * loss, seed=seed)
    return replace(
        system, win=win, loss=loss, n=n, win_rate=rate.value, win_rate_ci95=rate.interval,
        exact_ci95=clopper_pearson(win, win + loss) if win + loss else None, p_sign=sign_test(win, loss),
        bounds=Interval(points / (n + system.unparsed), (points + system.unparsed) / (n + system.unparsed)),
        extra=system.extra | {"forfeits": [len(missing.second), len(missing.first)]},
    )  # fmt: skip
