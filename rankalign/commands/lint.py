"""Find what is wrong in a file of candidates: rules with codes, counts, examples, and what the longest answer wins."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

from rankalign.data.convert import Intake
from rankalign.data.formats.unread import ALL
from rankalign.data.lint import RULES, LintReport, lint, mend
from rankalign.data.lint.whole import Leaked, NearlySame, Watch
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, write
from rankalign.data.spool import Spool
from rankalign.evaluation.tables import Table, render
from rankalign.scorers.hardening import report as canary_report
from rankalign.scorers.judge_prompts import find_prompt

EXAMPLE = "rankalign lint runs/demo/candidates.jsonl"
SHOWN = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    parser.add_argument("file", nargs="+", help="candidates in any known format; several files are one set")
    parser.add_argument("--format", default="auto", help="format of the file: auto or a name of `rankalign ls formats`")
    parser.add_argument("--held-out", help="a file whose prompts must not be among the candidates'")
    parser.add_argument("--against", nargs="+", help="evaluation sets: no prompt should share 13 words with one")
    parser.add_argument(
        "--near_duplicates", type=float, metavar="SHARE", help="prompts that share so much of their words, such as 0.8"
    )
    parser.add_argument("--model", default="", help="a model whose tokenizer's control tokens texts should not spell")
    parser.add_argument("--fix", metavar="OUT", help="write the records to OUT with all that can be mended safely")
    parser.add_argument("--canaries", action="store_true", help="also look for answers that talk to a judge")
    parser.add_argument(
        "--skip-invalid", "--skip_invalid", action="store_true", help="leave bad lines out, with their count"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """``{"records", "skipped", "findings": {code: count}}``, with examples and baselines beside."""
    intake = Intake(args.skip_invalid, ALL)  # an unread column is a finding here (L404), not an error
    records = load(args.file[0], args.format, intake, *args.file[1:])
    # Records are kept only for whom they have to pass again.
    sets: Iterable[CandidateSet] = Spool(records) if args.fix or args.canaries else records
    report = lint(
        sets,
        load(args.held_out, "auto", Intake(args.skip_invalid, ALL)) if args.held_out else (),
        _control(args.model),
        SHOWN,
        _asked(args),
    )
    result = {"records": report.records, "skipped": len(intake.errors), "findings": report.counts()}
    result["left_out"] = intake.losses.counts
    result |= {"unread": intake.unread.counts, "renamed_ids": intake.renamed}
    if args.fix:
        done = Counter[str]()
        result["written"] = write(args.fix, mend(sets, done))
        result["fixed"] = dict(done)
    if args.canaries:
        result["canaries"] = canary_report(sets, find_prompt("", "pointwise").axes)
    longest = {judge: dataclasses.asdict(found) for judge, found in report.longest.items()}
    docs = {code: section(code) for code in report.counts()}
    return {**result, "examples": _examples(report), "longest_answer": longest, "docs": docs}


def section(code: str) -> str:
    """Where the documentation explains a rule: what it sees, why it matters, what to do."""
    title = f"{code} {RULES[code].summary}".lower()
    return "docs/lint.md#" + re.sub(r"[^\w\- ]", "", title).replace(" ", "-")


def _asked(args: argparse.Namespace) -> dict[str, Watch]:
    found: dict[str, Watch] = {}
    if args.near_duplicates is not None:
        found["L405"] = NearlySame(args.near_duplicates)
    if args.against:
        intake = Intake(args.skip_invalid, ALL)
        found["L406"] = Leaked(chain.from_iterable(load(path, "auto", intake) for path in args.against))
    return found


def _control(model: str) -> tuple[str, ...]:
    if not model:
        return ()
    from rankalign.data.special import controls
    from rankalign.models.load import load_tokenizer

    return controls(load_tokenizer(model)).names


def _examples(report: LintReport) -> dict[str, list[dict[str, Any]]]:
    return {code: [dataclasses.asdict(f) for f in found[:SHOWN]] for code, found in report.findings.items() if found}


def tables(result: dict[str, Any]) -> list[Table]:
    """The rules that found something, and what the longest answer wins."""
    rows = []
    for code, count in result["findings"].items():
        if count:
            example = result["examples"][code][0]
            rows.append([code, count, RULES[code].summary, f"{example['record']}: {example['message']}"])
    note = f"{result['records']} records, {result['skipped']} bad lines left out"
    note += "".join(f"; {count} {reason} left out" for reason, count in result["left_out"].items())
    note += "; what each code means and what to do: docs/lint.md" if rows else ""
    found = [Table("Lint", ["code", "count", "rule", "first example"], rows, note)]
    if longest := result["longest_answer"]:
        names = list(next(iter(longest.values())))
        rows = [[judge, *(baseline[name] for name in names)] for judge, baseline in longest.items()]
        found.append(Table("The longest answer", ["judge", *names], rows))
    return found


def show(result: dict[str, Any]) -> None:
    """Print a table of the rules that found something, and a line on the longest answers of each judge."""
    render(tables(result)[0])
    for judge, found in result["longest_answer"].items():
        print(f"the longest answer, by {judge}: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    if "canaries" in result:
        _show_canaries(result["canaries"])
    if "fixed" in result:
        print(f"mended: {result['fixed']}; {result['written']} records written")


def _show_canaries(found: dict[str, Any]) -> None:
    kinds = ", ".join(f"{kind} {count}" for kind, count in found["attempts"].items()) or "none"
    print(f"{found['with_attempts']} of {found['answers']} answers talk to a judge or look as if they did ({kinds})")
    for policy, count in found["policies"].items():
        print(f"  {policy or 'no policy'}: {count}")
    for one in found["examples"]:
        print(f"  {one['record']}, {one['policy']}: {one['shown']!r}")
    print(
        f"hardening breaks {found['canaries'] - found['canaries_unbroken']} of the {found['canaries']} shipped canaries"
    )
