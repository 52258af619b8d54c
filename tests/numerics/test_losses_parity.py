"""Every loss, in every variant, against its 50-digit definition; RRHF's released arithmetic; the written page."""

from __future__ import annotations

from typing import Any

import pytest
from parity.__main__ import on_page, page
from parity.cases import PAPERS, VARIANTS
from parity.rows import Row, definition_row, release_row

from rankalign.losses import LOSSES

ROWS = [pytest.param(name, k, id=f"{name}-{k}") for name in LOSSES for k in VARIANTS[name]]


@pytest.mark.parametrize(("name", "keywords"), ROWS)
def test_definition(name: str, keywords: dict[str, Any]) -> None:
    row = definition_row(name, keywords)
    assert row.value_error <= row.tolerance
    assert row.gradient_error <= row.tolerance
    assert on_page(row), "docs/parity.md is out of date: run `make parity`"


def test_released_rrhf() -> None:
    row = release_row()
    assert row.ok
    assert on_page(row)


def test_every_loss_is_compared() -> None:
    assert VARIANTS.keys() == PAPERS.keys() == LOSSES.keys()


def test_page_keeps_the_order_of_the_losses() -> None:
    rows = [Row(name, "oracle", {}, 0.0, 3e-10, 1e-9) for name in reversed(LOSSES)]
    lines = page(rows).splitlines()
    assert lines[-1] == "| sft | maximum likelihood | - | oracle | defaults | ≤ 1e-12 | ≤ 1e-9 |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in lines[-len(LOSSES) :]] == list(LOSSES)
