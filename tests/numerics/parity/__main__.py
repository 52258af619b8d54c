"""Compare every loss with its oracles and write docs/parity.md: ``python -m tests.numerics.parity``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import ceil, log10
from pathlib import Path

from rankalign.losses import LOSSES

from .cases import MIXTURES, PAPERS
from .rows import Row, definition_rows, release_row, run_trl, trl_comparisons

PAGE = Path(__file__).resolve().parents[3] / "docs" / "parity.md"
HEAD = """# Parity of the losses

Written by `make parity`; do not edit. Each loss, in several configurations, against its definition from the paper in
50-digit arithmetic (`tests/numerics/parity/definitions.py`, loops over one list, derivatives by differences at 50
digits), and, where one exists, against another implementation that is run, not retyped: TRL 1.16's own code in double
precision, and RRHF's released arithmetic from logits. The lists are ragged (1 to 6 candidates), with ties, and padded
with NaN and infinities. Errors are the largest absolute difference over all lists, rounded up to a power of ten, at
least 1e-12; the gradient is the one with respect to the log-probs, or to the logits where it says so. SPPO's values are
near 5e5, so its errors are the rounding of that. TRL's alpha divergence knows no double precision.

| loss | paper | equation | oracle | configuration | value | gradient |
|---|---|---|---|---|---|---|
"""


def bound(error: float) -> str:
    """An error rounded up to a power of ten of at least 1e-12, so that the page is the same on every machine."""
    return f"≤ 1e{max(ceil(log10(max(error, 1e-12))), -12)}"


def line(row: Row) -> str:
    """A row as Markdown."""
    paper, equation = PAPERS.get(row.loss) or MIXTURES[row.loss]
    keywords = ", ".join(f"{k}={v}" for k, v in row.keywords.items()) or "defaults"
    errors = bound(row.value_error), bound(row.gradient_error)
    return "| " + " | ".join((row.loss, paper, equation, row.oracle, keywords, *errors)) + " |"


def page(rows: Iterable[Row]) -> str:
    """The whole page, in the order of LOSSES."""
    order = [*LOSSES, *MIXTURES]
    return HEAD + "\n".join(line(row) for row in sorted(rows, key=lambda row: order.index(row.loss))) + "\n"


def on_page(row: Row) -> bool:
    """Whether the written page shows this comparison, whatever its errors."""
    return line(row).rsplit("|", 3)[0] in PAGE.read_text(encoding="utf-8")


def main() -> int:
    """Run everything, print the page, write it, and fail if a row is off or a loss has none."""
    rows = [*definition_rows(), release_row(), *map(run_trl, trl_comparisons())]
    text = page(rows)
    print(text)
    PAGE.write_text(text, encoding="utf-8")
    wrong = [f"{row.loss} {row.keywords} against {row.oracle}" for row in rows if not row.ok]
    wrong += [f"{name} was compared with nothing" for name in LOSSES.keys() - {row.loss for row in rows}]
    print("\n".join(wrong) or f"{len(rows)} comparisons of {len(LOSSES)} losses, all within tolerance", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
