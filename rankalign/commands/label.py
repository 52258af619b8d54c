"""A page in the browser to rank the answers of each record by hand; scores are stored under the annotator's name.

Several annotators share one --output, each with an own order of the answers and without sight of the others' ranking;
their work lies in OUTPUT.labels. Stopped at any moment, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rankalign.commands import add_reading_arguments, intake_of, say_left_out, show_facts
from rankalign.data.load import load
from rankalign.evaluation import EvalResult
from rankalign.evaluation.tables import Table, from_result, render
from rankalign.interactive.pages.label import LabelServer
from rankalign.interactive.ranking import Session

EXAMPLE = "rankalign label runs/candidates.jsonl --output runs/labelled.jsonl --annotator ann"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to rank, who ranks and where the scores go."""
    parser.add_argument("file", help="records with responses, in any known format")
    parser.add_argument("--output", required=True, help="where the records with the scores of all annotators go")
    parser.add_argument("--annotator", required=True, help="who ranks: the name under which the scores are stored")
    parser.add_argument("--format", default="auto", help="format of the file: auto or a name of `rankalign ls formats`")
    add_reading_arguments(parser)
    parser.add_argument("--port", type=int, default=0, help="port on the loopback address; 0 takes a free one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in which answers are shown")
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="begin with the sets that other annotators have ranked, to measure agreement; else these come last",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until the page's finish button or Ctrl-C, then write the output; :mod:`rankalign.interactive.ranking`."""
    intake = intake_of(args)
    sets = list(load(args.file, args.format, intake))
    say_left_out(intake)
    with Session(sets, Path(args.output), args.annotator, args.seed, args.overlap) as session:
        facts = _serve(session, args.port)
        return facts | {"agreement": session.agreement()}


def _serve(session: Session, port: int) -> dict[str, Any]:
    with LabelServer(session, port) as server:
        _greet(session, server.url)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            facts = session.write()
            if facts["left"]:
                done = f"{facts['ranked']} ranked, {facts['skipped']} skipped, {facts['left']} to go"
                raise KeyboardInterrupt(f"{done}; {session.output} is written, the same command goes on") from None
            return facts
        return session.write()


def _greet(session: Session, url: str) -> None:
    counts = session.counts()
    print(f"{counts['left']} of {counts['total']} sets to rank; open {url}", file=sys.stderr)
    if passed := len(session.sets) - counts["total"]:
        print(f"passed over: {passed} records with fewer than two answers", file=sys.stderr)
    if aside := len(session.rankings.aside):
        print(f"set aside: work on {aside} sets that are not, or no longer so, in the file", file=sys.stderr)
    print("Ctrl-C stops; every committed ranking is on disk already", file=sys.stderr, flush=True)


def tables(result: dict[str, Any]) -> list[Table]:
    """The agreement of two annotators or more."""
    if not (found := result["agreement"]):
        return []
    ci95 = {name: (low, high) for name, (low, high) in found["ci95"].items()}
    title = f"Agreement of {', '.join(found['raters'])}"
    return [from_result(title, EvalResult(found["metrics"], found["n"], ci95))]


def show(result: dict[str, Any]) -> None:
    """Print the counts and, of two annotators or more, their agreement."""
    show_facts({name: value for name, value in result.items() if name not in ("agreement", "annotators")})
    for table in tables(result):
        render(table)
