"""Win, tie or lose by people: a blinded CSV sheet out, filled sheets in, with agreement of the raters."""

from __future__ import annotations

import csv
import io
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from rankalign.data.records import CandidateSet
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.pairwise.scores import System, match, summarise
from rankalign.evaluation.statistics import clopper_pearson
from rankalign.evaluation.tables import Table, interval
from rankalign.evaluation.texts.lexical import prompt_text
from rankalign.scorers.aggregate import cohen_kappa, krippendorff_alpha
from rankalign.storage.delimited import FORMULA
from rankalign.storage.files import atomic_writer, read_text
from rankalign.storage.jsonl import dumps, loads

COLUMNS = ("item", "prompt", "answer_1", "answer_2", "verdict")
VERDICTS = {"1": 1.0, "2": 0.0, "tie": 0.5}
"""What a rater may write, as points of the answer shown first."""


# --- out ---------------------------------------------------------------------------------------------------------


def write_sheet(
    path: str | os.PathLike[str],
    a: Sequence[CandidateSet],
    b: Sequence[CandidateSet],
    names: tuple[str, str] = ("a", "b"),
    seed: int = 0,
) -> dict[str, Any]:
    """Write a sheet for raters and, beside it, the key that says which answer is whose.

    Rows and sides are shuffled; nothing in the sheet names a system. The first answer of each record is shown.

    Args:
        path: the sheet, ``*.csv``; the key is ``*.key.json`` and stays with you.
        a: records of the first system.
        b: records of the second, same ids.
        names: what to call the two in the results.
        seed: of the shuffles.

    Returns:
        ``{"sheet", "key", "items", "without_answer"}``.

    Raises:
        InputError: the prompts do not match, or no prompt has two answers.
    """
    matched = match(a, b)
    order = [number for number, pair in enumerate(matched) if all(record.responses for record in pair)]
    if not order:
        raise InputError("no prompt has an answer in both files")
    rng, sheet = random.Random(seed), Path(path)
    rng.shuffle(order)
    # Row by row, for there may be a million; the key is in place before the sheet, which says nothing without it.
    with atomic_writer(sheet) as raw, atomic_writer(key_of(sheet)) as key:
        key.write(dumps({"a": names[0], "b": names[1], "seed": seed})[:-1].encode() + b', "items": {')
        out = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        out.write("\ufeff")  # the mark by which spreadsheets know UTF-8
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for number, place in enumerate(order, start=1):
            left, right = matched[place]
            a_first = rng.random() < 0.5
            item = {"id": left.id, "first": names[0] if a_first else names[1]}
            key.write(f'{", " if number > 1 else ""}"{number}": {dumps(item)}'.encode())
            texts = [record.responses[0].shown() for record in ((left, right) if a_first else (right, left))]
            writer.writerow([number, *map(_inert, (prompt_text(left.prompt), *texts)), ""])
        out.detach()  # flushed, and left open for its being synced
        key.write(b"}}\n")
    found = {"sheet": str(sheet), "key": str(key_of(sheet)), "items": len(order)}
    return found | {"without_answer": len(matched) - len(order)}


def key_of(sheet: str | os.PathLike[str]) -> Path:
    """Where the key of a sheet is kept."""
    return Path(sheet).with_suffix(".key.json")


def _inert(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) else text


# --- in ----------------------------------------------------------------------------------------------------------


@dataclass
class Agreement:
    """How two raters agree on the items that both rated.

    Attributes:
        raters: their names.
        same: items with one verdict.
        n: items that both rated.
        kappa: Cohen's; None where chance explains all.
        decided_same: items on which both prefer the same answer.
        decided: items on which neither says tie.
    """

    raters: tuple[str, str]
    same: int
    n: int
    kappa: float | None
    decided_same: int
    decided: int


@dataclass
class Ratings:
    """What people said of ``a`` and ``b``.

    Attributes:
        system: all raters together; an item is won by who has more points over its raters.
        raters: (win, tie, loss) of ``a`` by rater.
        unrated: items without any verdict.
        blank: cells without a verdict, by rater.
        pairs: agreement of each two raters.
        fleiss: Fleiss' kappa over the items that all rated; None with one rater or where chance explains all.
        alpha: Krippendorff's, nominal, gaps allowed.
    """

    system: System
    raters: dict[str, tuple[int, int, int]]
    unrated: int
    blank: dict[str, int]
    pairs: list[Agreement] = field(default_factory=list)
    fleiss: float | None = None
    alpha: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        own = {name: list(counts) for name, counts in self.raters.items()}
        pairs = [vars(pair) | {"raters": list(pair.raters)} for pair in self.pairs]
        facts = {"unrated": self.unrated, "blank": self.blank, "fleiss": self.fleiss, "alpha": self.alpha}
        return {"system": self.system.as_dict(), "raters": own, "agreement": pairs, **facts}

    def tables(self) -> list[Table]:
        """Results and agreement for people."""
        found = self.system
        rows: list[list[Any]] = [[name, *counts, None, None] for name, counts in self.raters.items()]
        rows.append(["together", found.win, found.tie, found.loss, found.win_rate, interval(found.win_rate_ci95)])
        note = f"seen from {found.a}, against {found.b}; {found.n} items, {self.unrated} unrated"
        note += f"; sign test p = {found.p_sign:.3g}"
        tables = [Table("Verdicts", ["rater", "win", "tie", "loss", "win rate", "95 % interval"], rows, note)]
        if self.pairs:
            tables.append(self._agreement())
        return tables

    def _agreement(self) -> Table:
        rows = []
        for pair in self.pairs:
            bounds = interval(clopper_pearson(pair.same, pair.n)) if pair.n else None
            decided = f"{pair.decided_same}/{pair.decided}"
            rows.append([" – ".join(pair.raters), f"{pair.same}/{pair.n}", bounds, decided, pair.kappa])
        known = [("Fleiss' kappa", self.fleiss), ("Krippendorff's alpha", self.alpha)]
        note = "; ".join(f"{name} {value:.3f}" for name, value in known if value is not None)
        columns = ["raters", "same verdict", "95 % interval", "same, ties left out", "Cohen's kappa"]
        return Table("Agreement", columns, rows, note)


def read_sheets(paths: Sequence[str | os.PathLike[str]], key: str | os.PathLike[str], seed: int = 0) -> Ratings:
    """Counts, intervals and agreement from filled sheets, one a rater, named by its file.

    Args:
        paths: filled copies of one sheet; a rater may leave cells blank.
        key: the sheet's key.
        seed: seed of the bootstrap.

    Raises:
        InputError: two files of one name, a key that is none, or no verdict at all.
        RecordError: a row's item or verdict is not known.
    """
    a, b, items = _read_key(key)
    raters = {Path(path).stem: _read_sheet(path, items, a) for path in paths}
    if len(raters) < len(paths):
        raise InputError("two sheets have the same file name; name each after its rater")
    given = {item: [found[item] for found in raters.values() if item in found] for item in items}
    pairs = [(sum(points), len(points) - sum(points)) for points in given.values() if points]
    unrated = len(items) - len(pairs)
    system = summarise(a, b, pairs, unrated, seed=seed)
    counts = {name: _counts(found.values()) for name, found in raters.items()}
    blank = {name: len(items) - len(found) for name, found in raters.items()}
    complete = [points for points in given.values() if len(points) == len(raters)]
    ratings = [[found.get(item) for found in raters.values()] for item in items]
    return Ratings(
        system, counts, unrated, blank, [_agree(*two) for two in combinations(raters.items(), 2)],
        fleiss_kappa(complete), krippendorff_alpha(ratings) if len(raters) > 1 else None,
    )  # fmt: skip


def _counts(points: Any) -> tuple[int, int, int]:
    found = Counter(points)
    return found[1.0], found[0.5], found[0.0]


def _read_key(path: str | os.PathLike[str]) -> tuple[str, str, dict[str, str]]:
    """Both names, and by item who is shown first."""
    try:
        content = loads(read_text(path))
        items = {str(item): str(row["first"]) for item, row in content["items"].items()}
        return str(content["a"]), str(content["b"]), items
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not the key of a sheet (it is written beside it, as *.key.json)") from None


def _read_sheet(path: str | os.PathLike[str], items: Mapping[str, str], a: str) -> dict[str, float]:
    """Points of ``a`` by item, where there is a verdict."""
    text = read_text(path)
    header = text.split("\n", 1)[0]
    # Spreadsheets write semicolons where the comma is the decimal sign.
    rows = csv.DictReader(io.StringIO(text), delimiter=";" if header.count(";") > header.count(",") else ",")
    if missing := {"item", "verdict"} - set(rows.fieldnames or ()):
        raise InputError(f"{path}: has no column {' and no column '.join(sorted(missing))}")
    found: dict[str, float] = {}
    for row in rows:
        item, verdict = (row["item"] or "").strip(), (row["verdict"] or "").strip().lower()
        if item not in items or item in found:
            raise RecordError(str(path), rows.line_num, "item", f"{item!r} is not in the key, or stands here twice")
        if verdict and verdict not in VERDICTS:
            raise RecordError(str(path), rows.line_num, "verdict", f"expected 1, 2, tie or nothing, found {verdict!r}")
        if verdict:
            found[item] = VERDICTS[verdict] if items[item] == a else 1 - VERDICTS[verdict]
    return found


def _agree(one: tuple[str, dict[str, float]], other: tuple[str, dict[str, float]]) -> Agreement:
    both = [(points, other[1][item]) for item, points in one[1].items() if item in other[1]]
    decided = [x == y for x, y in both if 0.5 not in (x, y)]
    kappa = cohen_kappa([x for x, _ in both], [y for _, y in both])
    return Agreement((one[0], other[0]), sum(x == y for x, y in both), len(both), kappa, sum(decided), len(decided))


def fleiss_kappa(ratings: Sequence[Sequence[float]]) -> float | None:
    """Fleiss' kappa (1971) of items that the same number of raters classed; None where it is not defined."""
    raters = len(ratings[0]) if ratings else 0
    if raters < 2:
        return None
    counts = [Counter(item) for item in ratings]
    observed = sum((sum(n * n for n in own.values()) - raters) / (raters * (raters - 1)) for own in counts) / len(
        counts
    )
    total: Counter[float] = sum(counts, Counter())
    chance = sum((n / (raters * len(counts))) ** 2 for n in total.values())
    return (observed - chance) / (1 - chance) if chance < 1 else None
