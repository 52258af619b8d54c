"""The cache's name: before transformers 5.24, since, of state-space models, and of none."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from rankalign.engines.decode import Rows
from rankalign.models import tiny
from rankalign.models.caches import cache_name


def named(name: str) -> Any:
    """The class of ``tiny``, whose forward knows the cache by this name."""
    plain: Any = type(tiny.build_model())
    known = str(cache_name(tiny.build_model()))

    def forward(self: Any, **given: Any) -> Any:
        return plain.forward(self, **{known if key == name else key: value for key, value in given.items()})

    told = inspect.signature(plain.forward)
    parameters = [p.replace(name=name) if p.name == known else p for p in told.parameters.values()]
    forward.__signature__ = told.replace(parameters=parameters)  # type: ignore[attr-defined]
    return type("Named", (plain,), {"forward": forward})


@pytest.mark.parametrize("name", ["past_key_values", "cache_params", "cache"])
def test_rows_remember_under_every_name(name: str) -> None:
    plain = tiny.build_model().eval()
    model = named(name)(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert cache_name(model) == name
    prompts, more = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13]]
    rows = Rows(model, prompts)
    for at in range(2):
        rows.append(torch.tensor([row[at] for row in more]))
    for row, (prompt, rest) in enumerate(zip(prompts, more, strict=True)):
        whole = plain(input_ids=torch.tensor([prompt + rest])).logits[0, -1]
        assert torch.allclose(rows.logits[row], whole, atol=1e-5)


def test_a_model_without_a_cache_has_no_name_for_one() -> None:
    assert cache_name(torch.nn.Linear(2, 2)) is None
