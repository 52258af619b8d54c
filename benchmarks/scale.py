"""Every stage at 10^4, 10^5, 10^6 prompts: CPU seconds, peak memory, and the exponent of growth.

Each command runs in a process of its own, on synthetic records of six answers of 120 words to each prompt. A stage that
reaches the limit is stopped there, which the table says, and is not tried at larger sizes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from benchmarks import records, training_start
from benchmarks.results import ROOT, cpu_name, write_section
from benchmarks.stage import HEADER, Cost, Stage, keep, kept, line_of, measure, python

STAGES: dict[str, Stage] = {**records.STAGES, **training_start.STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="prompts")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds a command may take")
    parser.add_argument("--folder", help="where data and measured costs lie and stay; else a temporary folder")
    parser.add_argument("--again", action="store_true", help="measure what the folder knows the cost of, too")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what the folder knows")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder and os.path.dirname(arguments.folder)) as fresh:
        table(Path(arguments.folder or fresh), arguments)


def table(root: Path, arguments: argparse.Namespace) -> None:
    for size in arguments.sizes:
        if not (root / str(size) / "part.yaml").exists():  # which is written last
            making = python("-m", "benchmarks.records", "make", str(root / str(size)), str(size))
            subprocess.run(making, cwd=ROOT, check=True)
    head = f"{datetime.date.today().isoformat()}; Python {platform.python_version()}; {cpu_name()}, {os.cpu_count()}"
    lines = [f"{head} processors; limit {arguments.limit:.0f} s a command", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    print("\n".join(lines), flush=True)
    for name in arguments.stages:
        stage, found = STAGES[name], dict[int, Cost]()
        for size in arguments.sizes:
            if any(cost.failed for cost in found.values()) or (stage.most and size > stage.most):
                break
            known = None if arguments.again else kept(name, root / str(size))
            if known is None and not arguments.kept:
                known = measure(stage, root / str(size), arguments.limit)
                keep(name, root / str(size), known)
            if known is not None:
                found[size] = known
        if not found:
            continue
        lines.append("| " + " | ".join(line_of(stage, found)) + " |")
        print(lines[-1], flush=True)
        if arguments.write:  # after each row: a run of an hour may be stopped
            write_section("`python -m benchmarks.scale`", lines)


if __name__ == "__main__":
    main()
