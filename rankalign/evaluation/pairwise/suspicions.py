"""Judges that go by the place of an answer or by its length, or of whom little can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rankalign.data.shares import wilson
from rankalign.evaluation import Row
from rankalign.evaluation.pairwise.alpaca_eval import Leaderboard
from rankalign.evaluation.pairwise.scores import Comparison
from rankalign.evaluation.tables import interval

READABLE = 0.9  # a smaller share of readable reviews is named
FIRST = 0.75  # a larger share of first answers that win is named, if the orders agree on less than half
ONE_SIDED = 0.95  # the same where only one order was judged
LONGER = 0.7  # a lower end of the share of longer answers that win above this is named
ONE_LONGER = "; one side is nearly always the longer one, so length and quality cannot be told apart"
FEWEST = 10  # decided reviews from which shares are looked at


class Suspicion(NamedTuple):
    """A name, and one sentence for people."""

    name: str
    message: str


def judge_suspicions(found: Comparison | Leaderboard) -> list[Suspicion]:
    """What the figures themselves say against the judge."""
    if isinstance(found, Leaderboard):
        rows = [row for row in found.rows if "longer_wins" in row]
        return [item for row in rows for item in _length_of_row(row)]
    return [*_readable(found), *_position(found)]


def _length_of_row(row: Row) -> list[Suspicion]:
    won, decided = row["longer_wins"]
    return _length(won, decided, f" of {row['model']} and the reference", ONE_LONGER * (not row["length_overlap"]))


def _readable(found: Comparison) -> list[Suspicion]:
    rate = found.extra.get("parse_rate")
    count = found.extra.get("reviews") or found.extra.get("calls") or 0
    if rate is None or rate >= READABLE or not count:
        return []
    read = round(rate * count)
    end = "there is no result" if not read else "what is left may not be like the rest"
    return [Suspicion("unreadable-judge", f"Only {read} of {count} verdicts could be read, so {end}.")]


def _position(found: Comparison) -> list[Suspicion]:
    position, shown = found.extra.get("position"), found.extra.get("first_of_decided", (0, 0))
    if not shown[1]:
        return []
    share = shown[0] / shown[1]
    which, part = ("first", share) if share >= 0.5 else ("second", 1 - share)
    said = f"The answer shown {which} wins in {part:.0%} of {shown[1]} decided reviews"
    if position and found.order_consistency is not None:
        low, high = position["first_wins_ci95"]
        sure = low > 0.5 or high < 0.5
        if sure and part >= FIRST and found.order_consistency < 0.5:
            agree = f"(95 % interval of the first {interval((low, high))}), and the two orders agree on"
            message = f"{said} {agree} {found.order_consistency:.0%} of the questions: the judge follows the place."
            return [Suspicion("judge-follows-position", message)]
    elif part >= ONE_SIDED and shown[1] >= FEWEST:
        message = f"{said}, and only one order was judged: place and quality cannot be told apart."
        return [Suspicion("judge-follows-position", message)]
    return []


def length_suspicions(leads: Sequence[tuple[float, float]]) -> list[Suspicion]:
    """Whether the longer answer wins nearly always.

    Args:
        leads: by prompt, how much longer a's answer is, and by how much a leads.
    """
    decided = [(longer, lead) for longer, lead in leads if longer and lead]
    sides = {longer > 0 for longer, _ in decided}
    won = sum((longer > 0) == (lead > 0) for longer, lead in decided)
    return _length(won, len(decided), "", ONE_LONGER * (len(sides) == 1))


def _length(won: int, decided: int, of: str, more: str = "") -> list[Suspicion]:
    if decided < FEWEST or (bounds := wilson(won / decided, decided))[0] <= LONGER:
        return []
    message = f"The longer answer{of} wins on {won} of {decided} decided prompts (95 % interval {interval(bounds)})"
    return [Suspicion("judge-follows-length", f"{message}: the judge may count words{more}.")]
