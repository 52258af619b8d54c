"""What a recipe's answers and grades come from, by content: a name or a path may stand for something else tomorrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankalign.config import ScorerConfig
from rankalign.engines import Policy
from rankalign.engines.settings import policy_settings
from rankalign.stages.generation import build_scorer


def contents(policies: Sequence[Policy], scorers: Sequence[ScorerConfig]) -> dict[str, Any]:
    """Hashes of weights, replayed files and scoring code, as part of a run's identity.

    Args:
        policies: those whose weights are fixed.
        scorers: settings of those who grade; they are built, and nothing heavy is loaded.

    Returns:
        ``{"answered_by": {policy: {"..._sha256": ...}}, "graded_by": {scorer: its fingerprint}}``.

    Raises:
        InputError: there is no such model, file, function or option.
    """
    told = {policy.name: policy_settings(policy) for policy in policies}
    return {
        "answered_by": {name: {k: v for k, v in of.items() if k.endswith("_sha256")} for name, of in told.items()},
        "graded_by": {scorer.name: build_scorer(scorer).fingerprint() for scorer in scorers},
    }
