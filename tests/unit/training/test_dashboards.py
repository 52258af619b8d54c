"""Figures under the names of other trainers: those of a hand-made batch, and no trace of them in log.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankalign.losses.ranked import Ranked
from rankalign.training.dashboards import Dashboards, without
from rankalign.training.meter import Meter


def batch() -> Ranked:
    """Two prompts: a pair whose better answer stands second, and three answers of which one is missing."""
    logps = torch.tensor([[-4.0, -2.0, 0.0], [-1.0, -9.0, -3.0]])
    refs = torch.tensor([[-3.0, -3.0, 0.0], [-3.0, -8.0, -2.0]])
    scores = torch.tensor([[0.0, 1.0, 99.0], [2.0, -99.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    return Ranked(logps, torch.full_like(logps, 4, dtype=torch.long), scores, mask, refs, torch.tensor([3, 3]))


def test_by_hand() -> None:
    meter = Meter(dashboards=Dashboards(0.5))
    meter.add(batch(), torch.tensor([1.0, 2.0]), {})
    read = meter.read("eval_")
    # beta (log p - log p_ref) of best and worst: 0.5 and -0.5; 1 and -0.5.
    assert read["eval_rewards/chosen"] == pytest.approx((0.5 + 1.0) / 2)
    assert read["eval_rewards/rejected"] == pytest.approx((-0.5 - 0.5) / 2)
    assert read["eval_rewards/margins"] == pytest.approx((1.0 + 1.5) / 2)
    assert read["eval_rewards/accuracies"] == 1.0
    assert read["eval_logps/chosen"] == pytest.approx((-2.0 - 1.0) / 2)
    assert read["eval_logps/rejected"] == pytest.approx((-4.0 - 3.0) / 2)
    alone = Meter()
    alone.add(batch(), torch.tensor([1.0, 2.0]), {})
    assert alone.read("eval_") == without(read)


def test_a_tracker_gets_them_and_the_log_does_not(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from rankalign.cli import main
    from rankalign.data.records import CandidateSet, Response, write

    answers = [Response("yes", finished=True, scores={"toy": 1.0}), Response("no", finished=True, scores={"toy": 0.0})]
    write(tmp_path / "data.jsonl", [CandidateSet(f"p{i}", "What?", answers) for i in range(4)])
    flags = ["--model", "tiny", "--data", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--loss", "dpo", *flags, "--max_steps", "2", "--report_to", "tensorboard"]) == 0
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    seen = reading.EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/rewards/chosen", "train/rewards/margins", "train/logps/chosen", "train/loss"} <= set(seen)
    assert "rewards/" not in (tmp_path / "run" / "log.jsonl").read_text()
