"""Shapes in which rows come that are none of a published data set: wrapped, in columns, with other verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.data.load import load
from rankalign.errors import InputError, RecordError

ROW = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Dog."}


@pytest.mark.parametrize("key", ["data", "rows", "examples", "instances"])
def test_rows_under_a_key_of_one_object(key: str, tmp_path: Path) -> None:
    path = tmp_path / "wrapped.json"
    path.write_text(json.dumps({key: [ROW, ROW]}, indent=1))
    read_back = list(load(path))
    assert [[r.text for r in record.responses] for record in read_back] == [["Red.", "Dog."]] * 2
    path.write_text(json.dumps({key: [ROW, {**ROW, "chosen": 3}]}, indent=1))
    with pytest.raises(RecordError, match=r"wrapped\.json:8: chosen: .* \(element 2 of the list\)"):
        list(load(path))


def test_one_row_on_several_lines(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ROW, indent=2))
    assert [r.text for r in next(iter(load(tmp_path / "one.json"))).responses] == ["Red.", "Dog."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train": [ROW], "test": [ROW]}, r"rows under train, test: .*jq -c '\.train\[\]'"),
        ({"version": 2, "data": [ROW]}, r"rows under data: "),
        ({name: [text, text] for name, text in ROW.items()}, r"holds columns \(prompt, chosen, rejected\), not rows"),
        ({name: {"0": text, "1": text} for name, text in ROW.items()}, "holds columns"),
        ({"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["c", "d"]}, r"chosen(\[0\])?: "),
        ({"chosen": ["a", "b"], "rejected": ["c", "d"], "subset": "x"}, r"chosen\[0\]: expected a message"),
    ],
)
def test_what_is_no_list_of_rows_is_told(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        list(load(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("verdict", "scores"),
    [
        ({"label": "A>B"}, [1, 0]),
        ({"label": "B>>A"}, [0, 1]),
        ({"label": "A<B"}, [0, 1]),
        ({"label": "A=B"}, [0.5, 0.5]),
    ],
)
def test_verdicts_with_signs(verdict: dict[str, Any], scores: list[float], tmp_path: Path) -> None:
    row = {"question": "Name a colour.", "response_A": "Red.", "response_B": "Dog.", **verdict}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert next(iter(load(tmp_path / "x.jsonl"))).scores("preference") == scores


@pytest.mark.parametrize(("value", "scores"), [(1, [1, 0]), (2, [0, 1]), (1.5, [0.5, 0.5]), (0, [0.5, 0.5])])
def test_alpaca_farms_number(value: float, scores: list[float], tmp_path: Path) -> None:
    row = {"instruction": "Name a colour.", "input": "", "output_1": "Red.", "output_2": "Dog.", "preference": value}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert next(iter(load(tmp_path / "x.jsonl"))).scores("preference") == scores
    (tmp_path / "x.jsonl").write_text(json.dumps({**row, "preference": 3}))
    with pytest.raises(RecordError, match="from 1 to 2"):
        list(load(tmp_path / "x.jsonl"))


def test_completions_with_a_grade_are_a_table(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": text, "score": grade} for text, grade in (("Hello.", 4), ("Go.", 1))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(load(tmp_path / "x.jsonl"))
    assert [[(r.text, r.scores["score"]) for r in record.responses] for record in records] == [
        [("Hello.", 4), ("Go.", 1)]
    ]
