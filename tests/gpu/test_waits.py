"""How often whole runs wait for the device, by the loop of transformers and accelerate: on the pretended one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rankalign.models import load as models
from rankalign.training.arguments import parse_settings
from rankalign.training.rank import RankTrainer
from rankalign.training.run import train
from tests.e2e.distributed import settings, write_data

KINDS: dict[str, dict[str, Any]] = {
    "rrhf": {"loss": "rrhf"},
    "dpo": {"loss": "dpo"},
    "dpo-lora": {"loss": "dpo", "use_lora": True},
    "sft": {"method": "sft"},
    "sft-checkpointing": {"method": "sft", "gradient_checkpointing": True},
    "reward": {"method": "reward"},
    "reward-per-token": {"method": "reward", "loss": "per_token"},
    "two-passes": {"loss": "dpo", "two_pass": "always"},
    "two-passes-in-parts": {"loss": "rrhf", "two_pass": "always", "token_budget": 30},
    "lists-in-parts": {"loss": "rrhf", "token_budget": 60, "two_pass": "never"},
}
QUIET = {"bf16": True, "save_strategy": "no", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 3}
# Which answers a gradient reaches, and whether all that had to hold before an update did.
ALLOWED = {"rows/tree.py", "rows/two_pass.py", "rows/checks.py"}
REFERENCES = "training/inputs.py"  # handed to the cache once an update, in the first epoch alone


@pytest.fixture(autouse=True)
def _device_again() -> Any:
    yield
    models.stay_on_cpu(False)


def waits(tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch, watch: Any, **more: Any) -> Counter[str]:
    """Places that wait within the training loop of a run, and how often."""
    data, found = write_data(tmp_path / "data.jsonl"), Counter[str]()
    whole: Any = RankTrainer.train

    def watched(self: RankTrainer, *args: Any, **kwargs: Any) -> Any:
        with watch() as log:
            done = whole(self, *args, **kwargs)
        found.update(where.split(":")[0] for _, where in log.waits)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(RankTrainer, "train", watched)
        train(parse_settings(settings(data, tmp_path / str(steps), **{**QUIET, "max_steps": steps, **more})))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_waits_twice_at_most(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    """What three more updates of a micro-batch each add, where no line is logged between."""
    more = {**KINDS[kind], "logging_steps": 100}
    added = waits(tmp_path, 6, monkeypatch, watch, **more) - waits(tmp_path, 3, monkeypatch, watch, **more)
    added.pop(REFERENCES, None)
    assert set(added) <= ALLOWED
    parts = 3 if "parts" in kind else 1  # lists that run one by one wait once each, and once for all of them
    assert sum(added.values()) <= 3 * (parts + 1)


def test_a_logged_line_adds_three_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Any) -> None:
    """Our sums in one, and transformers' own two: the loss and the gradient's norm."""
    counts = []
    for every in (1, 100):
        log = {"loss": "rrhf", "logging_steps": every}
        long, short = (waits(tmp_path / str(every), n, monkeypatch, watch, **log) for n in (6, 3))
        counts.append(sum((long - short).values()))
    assert counts[0] - counts[1] == 3 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_is_uploaded_in_few_copies_that_nobody_waits_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    data, logs = write_data(tmp_path / "data.jsonl"), []
    step: Any = RankTrainer.training_step

    def watched(self: RankTrainer, *args: Any, **kwargs: Any) -> Any:
        with watch() as log:
            done = step(self, *args, **kwargs)
        logs.append(log)
        return done

    monkeypatch.setattr(RankTrainer, "training_step", watched)
    train(parse_settings(settings(data, tmp_path / "run", **{**QUIET, "max_steps": 3, **KINDS[kind]})))
    assert not [where for log in logs for where in log.slow_uploads]
    if "parts" not in kind:  # the row; where sums go; what the loss reads; which rows have a gradient, and their trees
        assert {len(log.uploads) for log in logs} <= {3, 4, 5, 6}
