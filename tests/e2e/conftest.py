"""What end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread here and in new processes: more sum in another order, and some tests compare with workers of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the variable says nothing to a torch that is there already
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
