"""Lines read quickly give the records that they give slowly, and what is wrong with a line is never passed over."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rankalign.data.quick import quick_record
from rankalign.data.records import CandidateSet, parse, to_dict
from rankalign.errors import RecordError
from rankalign.storage.strict import object_at, quick_object

FULL = {
    "id": "a",
    "prompt": [
        {"role": "system", "content": 'Say "it".'},
        {"role": "user", "content": [{"type": "text", "text": "é"}]},
    ],
    "responses": [
        {
            "text": 'one \\"two\\" \\\\',
            "policy": "p",
            "finished": False,
            "count": 2,
            "scores": {"rm": 0.5, "j": None, "w": 3},
        },
        {
            "text": "",
            "sampling": {"temperature": 1.0, "stop": ['"']},
            "tokens": {"tokenizer": "t", "ids": [1, 2], "end": 2},
        },
        {"text": "日本\\", "meta": {"deep": [{"k": 'v:":'}, [], {}], "n": 1e300}, "scores": {}},
    ],
    "meta": {"source": "s", "list": [1, "two", {"three": None}]},
}
PLAIN = {
    "id": "b",
    "prompt": "Why?",
    "responses": [{"text": "So.", "policy": "m", "finished": True, "scores": {"rm": -1.25}}],
}
# What is put into lines, cut out of them or doubled: nothing that JSON or a record gives a meaning to is missing.
PIECES = [
    *('"', "\\", ":", ",", "{", "}", "[", "]", "null", "true", "1", "1.0", "-0", "1e400", "NaN", "9" * 30),
    *("\\ud800", "\\u0022", "\\\\", '\\"', "\u2028", "\t", "\x00", '"id":"b",', '"text":"x",', '"text" :"y",'),
    *('"policy":" ",', '"message":{},', '"meta":{"k":1,"k":2},', '"scores":{"a":1,"a":1},', '"count":0,'),
    *('"tools":[],', '"count":1.0,', '"policy":"q",', '"finished":true,'),
]


def slowly(line: bytes) -> CandidateSet | None:
    """What a line means with all checks; None where it is refused."""
    try:
        return parse(object_at("f", 1, line.decode("utf-8")), "f", 1)
    except (RecordError, UnicodeDecodeError):
        return None


def same(one: CandidateSet, other: CandidateSet) -> bool:
    # As text, too: 1 == 1.0 == True.
    return one == other and json.dumps(to_dict(one)) == json.dumps(to_dict(other))


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("row", [FULL, PLAIN, {"id": "c", "prompt": "p"}])
def test_sound_lines_are_read_quickly(row: dict[str, Any], ascii_only: bool) -> None:
    line = json.dumps(row, ensure_ascii=ascii_only).encode("utf-8")
    found, wanted = quick_record(line), slowly(line)
    assert found is not None
    assert wanted is not None
    assert same(found, wanted)


def test_lines_with_anything_wrong_are_left_to_the_checks() -> None:
    draw, quick, refused, objects = random.Random(4), 0, 0, 0
    lines = [
        json.dumps(row, ensure_ascii=False, separators=form)
        for row in (FULL, PLAIN)
        for form in ((",", ":"), (", ", ": "))
    ]
    for _ in range(6000):
        text = draw.choice(lines)
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(text) + 1)
            match draw.randrange(4):
                case 0:
                    text = text[:at] + draw.choice(PIECES) + text[at:]
                case 1:
                    text = text[:at] + text[at + draw.randint(1, 12) :]
                case 2:  # behind a brace or a comma, where a key stands
                    at = draw.choice([i for i, sign in enumerate(text) if sign in "{,"] or [0]) + 1
                    text = text[:at] + draw.choice(PIECES) + text[at:]
                case _:
                    end = at + draw.randint(1, 40)
                    text = text[:end] + text[at:end] + text[end:]
        line = text.encode("utf-8")
        row = quick_object(line)
        assert row is None or json.dumps(row) == json.dumps(object_at("f", 1, text)), line
        found, wanted = quick_record(line), slowly(line)
        refused += wanted is None
        objects += row is not None
        if found is not None:
            quick += 1
            assert wanted is not None, line
            assert same(found, wanted), line
    assert 200 < quick < objects
    assert refused > 2000


@pytest.mark.parametrize("number", ["-0", "0.0", "9" * 400, "-9223372036854775809", "0." + "3" * 60, "1E5", "1e-400"])
def test_numbers_are_those_of_the_slow_way(number: str) -> None:
    line = f'{{"a": [{number}]}}'
    assert json.dumps(quick_object(line.encode())) == json.dumps(object_at("f", 1, line))


@pytest.mark.parametrize("line", ["[]", '"a"', '{"a":NaN}', '{"a":1e400}', '{"a":"\\udc00"}', "{}{}", '{"a":1,"a":1}'])
def test_what_is_no_object_or_refused_is_left_to_the_slow_way(line: str) -> None:
    assert quick_object(line.encode()) is None
    with pytest.raises(RecordError):
        object_at("f", 1, line)


@pytest.mark.parametrize(
    "line",
    [
        '{"id":"a","prompt":"p","prompt":"p"}',
        '{"id":"a","prompt":"p","id" : "a"}',
        '{"id":"a","prompt":"p","meta":{"k":1,"k":1}}',
        '{"id":"a","prompt":"\\":","responses":[{"text":"x","text":"x"}]}',
        '{"id":"a","prompt":"\\u0022\\u0022","meta":{"":1,"":1}}',
        '{"id":"a","prompt":"p","responses":[{"text":"x","scores":{"j":1,"j":2}}]}',
        '{"id":"a","prompt":"p","responses":[{"text":"x","count":1.0}]}',
        '{"id":"a","prompt":"p","responses":[{"text":"x","count":true}]}',
        '{"id":"a","prompt":"p","responses":[{"text":"x","scores":{"j":true}}]}',
        '{"id":"a","prompt":"p","responses":[{"text":"x","tokens":{"tokenizer":"t","ids":[-1]}}]}',
        '{"id":"a","prompt":"p","meta":{"k":1e999}}',
        '{"id":"a","prompt":"p\\ud800"}',
    ],
)
def test_of_these_nothing_is_made(line: str) -> None:
    assert slowly(line.encode()) is None
    assert quick_record(line.encode()) is None
