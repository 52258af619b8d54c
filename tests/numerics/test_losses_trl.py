"""Values and gradients against TRL's own code. Importing TRL takes seconds; it happens in this file alone."""

from __future__ import annotations

from functools import partial

import pytest
from parity.__main__ import on_page
from parity.rows import Row, run_trl, trl_comparisons

DPO = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
)


@pytest.mark.parametrize("comparison", trl_comparisons(), ids=lambda c: "-".join(map(str, c.args[:3])))
def test_trl(comparison: partial[Row]) -> None:
    pytest.importorskip("trl")
    row = run_trl(comparison)
    assert row.value_error <= row.tolerance
    assert row.gradient_error <= row.tolerance
    assert on_page(row), "docs/parity.md is out of date: run `make parity`"


def test_nothing_is_left_out() -> None:
    """Every loss_type of TRL 1.16's DPO, KTO and CPO trainers, and ORPO: stated in the comparisons' arguments."""
    arguments = {str(a) for c in trl_comparisons() for a in c.args[:4]}
    assert arguments >= {*DPO.split(), "kto", "apo_zero_unpaired", "ORPOTrainer", "CPOTrainer"}
