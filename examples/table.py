"""The table at the end of each example: ``python examples/table.py answers.jsonl --judges rm --reference human``.

One column a policy of the file, one row a number. A trained policy bears the name of the folder that it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rankalign.cli import quiet_libraries
from rankalign.data.records import CandidateSet, read
from rankalign.errors import InputError
from rankalign.evaluation import by_policy
from rankalign.evaluation.raters.reward import evaluate_reward
from rankalign.evaluation.tables import Table, interval, render
from rankalign.evaluation.texts.divergence import evaluate_divergence
from rankalign.evaluation.texts.lexical import evaluate_lexical
from rankalign.evaluation.texts.perplexity import evaluate_perplexity
from rankalign.models import load as models
from rankalign.storage.files import write_text
from rankalign.storage.jsonl import dumps

Cells = dict[str, Any]


def reward_cells(sets: list[CandidateSet], judges: list[str]) -> Cells:
    """Mean score by each judge with its interval, and how many answers a judge could not grade, where there are any."""
    cells: Cells = {}
    for judge in judges:
        try:
            found = evaluate_reward(sets, judge)
        except InputError:
            cells[judge] = "no score"
            continue
        cells |= {judge: found.metrics["mean"], f"{judge} 95 %": interval(found.ci95["mean"])}
        if missing := found.metrics["unscored"]:
            cells[f"{judge} unscored"] = missing
    return cells


def text_cells(own: list[CandidateSet], reference: str, references: list[CandidateSet]) -> Cells:
    """ROUGE against the reference policy's answers, where one is named; length and repetition."""
    held = {record.id: record.responses for record in references}
    joined = [dataclasses.replace(r, responses=[*r.responses, *held.get(r.id, [])]) for r in own]
    found = evaluate_lexical(joined, reference=reference).metrics
    rouge = {f"ROUGE-{n}": found.get(f"rouge{n}") for n in ("1", "2", "L")} if reference else {}
    return {**rouge, "words": found["words"], "repetition": found["repetition"]}


def model_cells(name: str, sets: list[CandidateSet], start: Any, tokenizer: Any, template: str) -> Cells:
    """Perplexity under the start model, and the divergence from it of the policy whose folder is ``name``."""
    surprise = evaluate_perplexity(start, tokenizer, sets, template=template).metrics["perplexity"]
    if not Path(name).is_dir():
        return {"perplexity": surprise, "KL": 0.0}
    policy = models.load_policy(name, dtype="float32")
    return {"perplexity": surprise, "KL": evaluate_divergence(policy, start, tokenizer, sets, template).metrics["kl"]}


def build(args: argparse.Namespace) -> Table:
    """The table of ``args.file``."""
    groups = by_policy(read(args.file))
    references = groups.get(args.reference, [])
    start = (models.load_policy(args.start, dtype="float32"), models.load_tokenizer(args.start)) if args.start else ()
    columns: list[Cells] = []
    for name, sets in groups.items():
        cells = reward_cells(sets, args.judges)
        own = name == args.reference
        cells |= text_cells(sets, "" if own else args.reference, [] if own else references)
        cells |= model_cells(name, sets, *start, args.template) if start else {}
        columns.append(cells)
    names = dict.fromkeys(name for cells in columns for name in cells)
    rows = [[name, *(cells.get(name) for cells in columns)] for name in names]
    prompts = len(next(iter(groups.values())))
    return Table(args.title, ["", *groups], rows, f"{prompts} prompts; 95 % bootstrap over prompts")


def main() -> None:
    """Print the table and leave it in ``table.json`` beside the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="scored answers of all policies to the held-out prompts")
    parser.add_argument("--judges", nargs="+", required=True, help="whose scores")
    parser.add_argument("--reference", default="", help="policy that ROUGE compares with")
    parser.add_argument(
        "--start", default="", help="start model, for perplexity and KL of answers drawn at temperature 1"
    )
    parser.add_argument("--template", default="auto", help="prompt format of the answers")
    parser.add_argument("--title", default="Held-out prompts")
    args = parser.parse_args()
    quiet_libraries()
    table = build(args)
    write_text(Path(args.file).with_name("table.json"), dumps(dataclasses.asdict(table)) + "\n")
    render(table)


if __name__ == "__main__":
    main()
