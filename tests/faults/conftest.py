"""What the fault tests share: prompts, settings, and the outputs of runs that nobody disturbed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from rankalign.data.records import CandidateSet, write
from tests.faults.children import PROMPTS, finish

POLICIES = """policies:
  - {name: warm, model: tiny, n: 2, temperature: 1.0, max_new_tokens: 12}
  - {name: greedy, model: tiny, n: 1, temperature: 0, max_new_tokens: 12}
"""


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of the random moments: RANKALIGN_SEED, or a new one each time; tests show it when they fail."""
    return int(os.environ.get("RANKALIGN_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``prompts.jsonl``, ``sample.yaml`` and ``sampled.jsonl``, the candidates of 40 prompts."""
    where = tmp_path_factory.mktemp("faults")
    rng = random.Random(1)
    note = {"note": "n" * 400}  # outputs hold it, journals do not: a disk can be full for one and not for the other
    prompts = [CandidateSet(f"p{i}", "word " * rng.randint(1, 30), meta=note) for i in range(PROMPTS)]
    write(where / "prompts.jsonl", prompts)
    (where / "sample.yaml").write_text(f"prompts: {where}/prompts.jsonl\noutput: {where}/sampled.jsonl\n{POLICIES}")
    assert finish(["sample", "--config", f"{where}/sample.yaml"], where / "log") == 0, (where / "log").read_text()
    return where
