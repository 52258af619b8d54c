"""Checkpoints of PPO under launchers: shards are gone on with by those who made them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from rankalign.errors import InputError
from rankalign.training.ppo.launched import MADE, check_made

FSDP, ZERO = "FSDP of 2 processes", "DEEPSPEED of 2 processes"


def launch(kind: str, count: int = 2) -> Any:
    return SimpleNamespace(distributed_type=DistributedType[kind], num_processes=count)


@pytest.mark.parametrize(("kind", "made"), [("NO", ""), ("MULTI_GPU", ""), ("FSDP", FSDP), ("DEEPSPEED", ZERO)])
def test_a_checkpoint_of_its_own_is_taken(kind: str, made: str) -> None:
    check_made(launch(kind), Path("checkpoint-1"), {MADE: made} if made else {})


@pytest.mark.parametrize(
    ("here", "made", "message"),
    [
        (launch("FSDP"), "", "made by whole weights, and this launch is FSDP of 2"),
        (launch("MULTI_GPU"), FSDP, "made by FSDP of 2 processes, and this launch is whole weights"),
        (launch("DEEPSPEED"), FSDP, "this launch is DEEPSPEED of 2"),
        (launch("FSDP", 4), FSDP, "this launch is FSDP of 4"),
    ],
)
def test_another_launchers_is_refused(here: Any, made: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_made(here, Path("checkpoint-1"), {MADE: made} if made else {})
