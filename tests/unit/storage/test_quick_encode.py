"""Rows encoded quickly have the bytes that json gives them."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import random
import struct
from typing import Any

import pytest

from rankalign.storage.jsonl import dumps, encode


class Colour(enum.StrEnum):
    RED = "red"


class Half(float):
    pass


SIGNS = "".join(map(chr, range(0x20))) + '"\\/\x7f\x80\u2028\u2029\ufeff\uffffaé日😀 ,:{}[]'


def drawn(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return struct.unpack("<d", draw.randbytes(8))[0]  # any double at all
    if kind == 1:
        return draw.gauss(0, 10.0 ** draw.randint(-6, 18))
    if kind == 2:
        return draw.choice([0, -1, 2**63, 2**64, -(2**63) - 1, 10**40, 7])
    if kind == 3:
        return draw.choice([True, False, None, 0.0, -0.0, 1e16, 1e-4, 9.9e-5, 1e22, 123456789012345680.0])
    if kind < 6:
        return "".join(draw.choices(SIGNS, k=draw.randint(0, 9)))
    if kind == 6:
        return [drawn(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    return {str(drawn(draw, 9)): drawn(draw, depth + 1) for _ in range(draw.randint(0, 4))}


def test_bytes_are_those_of_json() -> None:
    draw, plain = random.Random(2), 0
    for _ in range(5000):
        row = {"row": drawn(draw)}
        try:
            wanted = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except ValueError:
            with pytest.raises(ValueError, match="Out of range"):
                encode(row)
        else:
            plain += 1
            assert encode(row) == wanted
    assert plain > 4000


@pytest.mark.parametrize(
    "value", [{1: 2}, {None: 1}, {True: 1}, (1, (2,)), Colour.RED, {Colour.RED: 1}, Half(0.5), [Half(0.5)]]
)
def test_values_that_only_json_has_a_form_for(value: Any) -> None:
    assert encode({"row": value}) == dumps({"row": value}).encode("utf-8")
    assert encode(value) == dumps(value).encode("utf-8")


@pytest.mark.parametrize(
    "value",
    [datetime.date(2026, 1, 1), b"bytes", decimal.Decimal("1"), {1, 2}, math.nan, -math.inf, "\ud800", {"\udfff": 1}],
)
def test_what_json_refuses_is_refused_in_its_words(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as wanted:
        dumps({"row": value}).encode("utf-8")
    with pytest.raises(wanted.type) as found:
        encode({"row": value})
    assert str(found.value) == str(wanted.value)


def test_a_row_that_holds_itself_is_refused() -> None:
    row: dict[str, Any] = {}
    row["row"] = [row]
    with pytest.raises(ValueError, match="Circular"):
        encode(row)
