"""Data sets by name under a stated format: what was mixed holds our records, whatever it was read from."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.data.load import load
from rankalign.storage.jsonl import write_rows
from rankalign.training.arguments import TrainConfig
from rankalign.training.locate import locate

ROWS = [{"id": f"a{i}", "prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)]


@pytest.mark.parametrize("stated", ["auto", "trl"])
@pytest.mark.parametrize(
    ("data", "eval_data", "share", "counts"),
    [
        ("a", "", 0.0, (40, 0)),
        ("a#12", "", 0.0, (12, 0)),
        ("a", "", 0.2, (40, None)),
        ("a#30", "", 0.2, (30, None)),
        ("a#12", "b", 0.0, (12, 7)),
        ("a", "b#3", 0.0, (40, 3)),
        ("a,b", "b#3", 0.0, (47, 3)),
    ],
)
def test_every_set_is_read_as_what_it_holds(
    data: str,
    eval_data: str,
    share: float,
    counts: tuple[int, int | None],
    stated: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", ROWS), ("b", [{**row, "id": f"b{row['id']}"} for row in ROWS[:7]])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    paths = [",".join(part.replace(part[0], f"{part[0]}.jsonl", 1) for part in text.split(",") if part)
             for text in (data, eval_data)]  # fmt: skip
    config = TrainConfig(output_dir="out", data=paths[0], eval_data=paths[1], eval_split=share, format=stated)
    locate(config)
    first = (config.data, config.eval_data, config.format)
    read = [list(load(path, config.format)) if path else [] for path in first[:2]]
    trained, measured = (sorted(record.id for record in sets) for sets in read)
    if share:
        assert measured
        assert len(trained) + len(measured) == counts[0]
        assert not set(trained) & set(measured)
    else:
        assert (len(trained), len(measured)) == counts
    assert all([r.text for r in record.responses] == ["yes", "no"] for sets in read for record in sets)
    locate(config)  # a second look changes nothing
    assert (config.data, config.eval_data, config.format) == first
