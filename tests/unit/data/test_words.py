"""Words in all scripts, against another implementation of UAX 29 and against what was counted in English before."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path

import pytest

from rankalign.data.words import pieces, words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't stop — won’t stop!", ["don't", "stop", "won’t", "stop"]),
        ("1990's e.g. foo_bar 3.14 m²", ["1990's", "e", "g", "foo_bar", "3", "14", "m²"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("ABC中文 テスト9", ["abc", "中", "文", "テ", "ス", "ト", "9"]),
        ("コーヒー", ["コ", "ー", "ヒ", "ー"]),
        ("ភាសា", ["ភា", "សា"]),
        ("e\u0301te\u0301 été", ["été", "été"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("👩‍👩‍👧 … !?", []),
        ("", []),
    ],
)
def test_words(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


SPACED = [
    "Сегодня хорошая погода, и мы идём в парк гулять.",
    "मुझे हिन्दी में एक छोटी कहानी लिखनी है।",
    "العَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ جدًّا.",
    "שלום, כ״ץ אוהב לקרוא ספרים.",
    "நான் தமிழில் எழுதுகிறேன்.",
    "আমি বাংলায় গান গাই।",
    "Tôi học tiếng Việt mỗi ngày.",
    "오늘은 날씨가 좋아서 산책을 갑니다.",
    "Η γλώσσα είναι ωραία, δεν είναι;",
    "L'été, la col·lecció d'art plaît à Zoë.",
    "ჩვენ ვსწავლობთ ქართულს.",
]


@pytest.mark.parametrize("text", SPACED)
def test_words_are_the_segments_of_uax_29(text: str) -> None:
    wordbreak = pytest.importorskip("uniseg.wordbreak")
    segments = [part.lower() for part in wordbreak.words(text) if any(char.isalnum() for char in part)]
    assert words(text) == segments


@pytest.mark.parametrize(
    "text", ["今天天气很好，我们去公园散步。", "今日はいい天気ですね。", "ไม่เป็นไรครับ", "ຂອບໃຈຫຼາຍໆ", "ကျွန်တော်"]
)
def test_scripts_without_blanks_count_by_what_a_reader_sees(text: str) -> None:
    breaks = pytest.importorskip("uniseg.graphemecluster")
    clusters = list(breaks.grapheme_clusters(text))
    assert words(text) == [part for part in clusters if unicodedata.category(part[0])[0] in "LM"]
    assert pieces(text + " and more") == [*clusters, "and", "more"]


def test_english_counts_as_it_did(data_kit: Path) -> None:
    rows = [
        json.loads(line)
        for line in gzip.decompress((data_kit / "alpaca_eval" / "candidates.jsonl.gz").read_bytes())
        .decode()
        .split("\n")[:1000]
    ]
    texts = [row["output"] for row in rows if not re.search("[^\x00-\x7f‘’“”–—é°²]", row["output"])]
    assert len(texts) > 500
    for text in texts:
        assert words(text) == re.findall(r"[^\W]+(?:['’][^\W]+)*", text.lower())
        assert pieces(text) == text.split()
