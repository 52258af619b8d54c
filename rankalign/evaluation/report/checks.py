"""Tables of the report from what other commands left in a run folder as JSON: numerics, lint, judge audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankalign.errors import InputError
from rankalign.evaluation import EvalResult
from rankalign.evaluation.tables import Table, from_dict, from_result, interval

Content = Mapping[str, Any]
_NUMERICS = ("drift", "max_drift", "changed", "unstable")


def check_tables(found: Mapping[str, Content]) -> list[Table]:
    """Tables of the files of :data:`CHECKS`, by file name.

    Raises:
        InputError: a file is not what the command prints.
    """
    tables = []
    for name, content in found.items():
        try:
            tables += CHECKS[name](content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            command = COMMANDS[name]
            raise InputError(f"{name}: not what `{command}` prints ({error!r}); write it again or remove it") from None
    return tables


def _numerics(content: Content) -> list[Table]:
    metrics = content["metrics"]
    modes = [name.removesuffix("_max_drift") for name in metrics if name.endswith("_max_drift")]
    rows = [[mode, *(metrics[f"{mode}_{name}"] for name in _NUMERICS)] for mode in modes]
    note = f"against float64, {content['n']} prompts, {metrics['pairs']:.0f} pairs; drifts in nats"
    columns = ["precision", "drift of a token", "of a response", "pairs changed", "pairs unstable"]
    return [Table("Numerics", columns, rows, note)]


def _lint(content: Content) -> list[Table]:
    rows = []
    for code, count in content["findings"].items():
        if count:
            example = content["examples"][code][0]
            rows.append([code, int(count), f"{example['record']}: {example['message']}"])
    note = f"{content['records']} records" + ("" if rows else "; no rule found anything")
    return [Table("Lint", ["rule", "count", "first example"], rows, note)]


def _audit(content: Content) -> list[Table]:
    systems = [
        [f"{row['a']} – {row['b']}", row["win_rate"], interval(row["win_rate_ci95"]), row["n"], row["unparsed"],
         row["detectable"]] for row in content["systems"]
    ]  # fmt: skip
    columns = ["", "win rate", "95 % interval", "prompts", "unparsed", "detectable difference"]
    return [*judge_tables(content), Table("Judged pairs", columns, systems)]


def judge_tables(content: Content) -> list[Table]:
    """What there is to know of the judge, and the sums by category, from what ``rankalign compare --json`` prints."""
    position: Content = content.get("position") or {}
    facts: list[list[Any]] = [
        ["parse rate", content.get("parse_rate"), None],
        ["attempts of answers to sway the judge", content.get("attempts"), None],
        ["alike in both orders", content.get("order_consistency"), None],
        ["alike when asked again", content.get("repeatability"), None],
        ["first answer wins", position.get("first_wins"), _bounds(position, "first_wins_ci95")],
        ["points for standing first", position.get("effect"), _bounds(position, "effect_ci95")],
        ["text and stored score differ", len(content.get("disagreements", ())), None],
    ]
    remarks = ". ".join(str(remark) for remark in content.get("remarks", ()))
    known = [row for row in facts if row[1] is not None]
    return [Table("Judge audit", ["", "value", "95 % interval"], known, remarks), *_categories(content)]


def _categories(content: Content) -> list[Table]:
    keys = ("n", "sum_a", "sum_b", "win", "tie", "loss")
    rows = [
        [f"{row['a']} – {row['b']}", name, *(found[key] for key in keys)]
        for row in content["systems"]
        for name, found in row.get("categories", {}).items()
    ]
    columns = ["", "category", "prompts", "sum a", "sum b", "win", "tie", "loss"]
    return [Table("By category", columns, rows)] if rows else []


def _agreement(content: Content) -> list[Table]:
    ci95 = {name: (float(low), float(high)) for name, (low, high) in content["ci95"].items()}
    found = EvalResult({name: float(value) for name, value in content["metrics"].items()}, int(content["n"]), ci95)
    return [from_result("Agreement of the judge", found)]


def _suite(content: Content) -> list[Table]:
    return [from_dict(table) for table in content["tables"]]


def _bounds(position: Content, name: str) -> str | None:
    return interval(position[name]) if name in position else None


CHECKS: dict[str, Callable[[Content], list[Table]]] = {
    "numerics.json": _numerics,
    "lint.json": _lint,
    "audit.json": _audit,
    "agreement.json": _agreement,
    "suite.json": _suite,
}
COMMANDS = {
    "numerics.json": "rankalign eval numerics --json",
    "lint.json": "rankalign lint --json",
    "audit.json": "rankalign compare --reviews FILE --json",
    "agreement.json": "rankalign eval agreement --json",
    "suite.json": "rankalign eval suite --json",
}


def training_warnings(log: Sequence[Content]) -> list[tuple[int, str, str]]:
    """Step, name and words of each warning that training gave."""
    found = []
    for line in log:
        warnings = line.get("warnings")
        if isinstance(warnings, dict):
            found += [(line.get("step", 0), str(name), str(words)) for name, words in warnings.items()]
    return found
