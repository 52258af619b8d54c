"""Batches on processes that train together: one that fails tells the others, which wait for its values."""

from __future__ import annotations

from typing import Any

import pytest

from rankalign.errors import InputError
from rankalign.stages import ranks


@pytest.mark.parametrize(
    ("error", "message"),
    [(InputError("no such prompt"), "^no such prompt$"), (RuntimeError("no memory"), "process 0 failed: .*no memory")],
)
def test_a_failure_is_told(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []

    def gather(values: list[Any]) -> list[Any]:
        told.extend(values)
        return values

    def worker(batch: Any) -> Any:
        raise error

    monkeypatch.setattr(ranks, "gather_object", gather)
    monkeypatch.setattr(ranks, "broadcast_object_list", lambda values: values)
    with pytest.raises(InputError, match=message):
        list(ranks.lead("key", worker, [[]]))  # type: ignore[arg-type]
    assert len(told) == 1
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, RuntimeError)
