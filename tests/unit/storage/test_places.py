"""Names as hashes, JSON lists a block at a time: the same as with everything in memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from rankalign.data.ids import SeenIds
from rankalign.errors import Line, RecordError
from rankalign.storage import json_list
from rankalign.storage.jsonl import read_rows
from rankalign.storage.places import ABSENT, Names, Places


@pytest.mark.parametrize("wide_from", [0, 10_000, 20_000])
def test_places_are_a_dictionary(wide_from: int) -> None:
    """Also where numbers outgrow 32 bits on the way."""
    draw, places, known = random.Random(3), Places(), dict[str, int]()
    for step in range(20_000):
        name = f"n{draw.randrange(8_000)}"
        assert places.find(name) == known.get(name, ABSENT)
        known[name] = draw.randrange(2**62) if step >= wide_from else 2**32 - 1 - step
        places.put(name, known[name])
    assert len(places) == len(known)
    assert all(places.find(name) == number for name, number in known.items())


def test_names_come_back() -> None:
    names = Names()
    given = ["", "a", "日本語", "é" * 300]
    assert [names.add(name) for name in given] == [0, 1, 2, 3]
    assert [names[k] for k in range(len(names))] == given


def test_where_an_id_stood_is_said() -> None:
    seen = SeenIds()
    seen.add("line", 7)
    seen.add("element", Line.of(2, 9))
    for number in range(3):
        seen.add(f"shard{number}", Line.of(5 + number, file=f"part-{number}.jsonl", row=100))
    assert [seen.earlier(name) for name in ("none", "line", "element", "shard2")] == [
        "", "on line 7", "in element 9", "on line 7 of part-2.jsonl",
    ]  # fmt: skip


LISTS = (
    '[{"a": "x\\ny"}, {"b": [1, {"c": "]"}]},\n\n {"d": "日本語"}\n]\n',
    "[]",
    '\n\n[\n {"a": 1}, 7, {"b": NaN}, {"c": 2}]',
    '[{"a": 1}, {"b": 2} {"c": 3}]',
    '[{"a": 1},\n {"b": "never ended}]',
    '[{"a": 1}] []',
    '[{"a": 1},\n{"b": 2',
    "[" * 100_000,
)


@pytest.mark.parametrize("content", LISTS, ids=lambda text: text[:12])
def test_a_list_read_in_blocks_is_the_list(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end anywhere change neither rows nor errors nor their places."""
    path = tmp_path / "list.json"
    path.write_text(content, encoding="utf-8")

    def read() -> tuple[list[tuple[int, int, object]], list[str]]:
        errors = list[RecordError]()
        rows = [(int(line), getattr(line, "element", 0), row) for line, row in read_rows(path, errors.append)]
        return rows, [str(error) for error in errors]

    whole = read()
    for block in (1, 3, 16):
        monkeypatch.setattr(json_list, "BLOCK", block)
        assert read() == whole
    try:
        assert [row for *_, row in whole[0]] == json.loads(content)
    except (json.JSONDecodeError, RecursionError, AssertionError):
        assert whole[1]


def test_a_file_is_not_held(tmp_path: Path) -> None:
    for name, (first, between, last) in {"lines": ("", "\n", "\n"), "list": ("[\n", ",\n", "\n]\n")}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(first + between.join(json.dumps({"text": "x" * 1000}) for _ in range(20_000)) + last)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 5e6  # of 20 MB
        tracemalloc.stop()
