"""Words of a text in any script: what lint, the text measures and ROUGE count.

A word is a segment of Unicode's default word boundaries (UAX 29) that holds a letter or digit: vowel signs, accents and
joiners belong to the letter before them. Two liberties keep English counts what they are elsewhere: full stop, comma
and colon always divide (``example.com`` is two words), and an apostrophe also joins digits (``1990's``). Scripts that
put no blanks between words (Chinese and Japanese, and those that need a dictionary to break a line: Thai, Lao, Khmer,
Burmese and their like) count by the sign that a reader sees, a grapheme cluster.
"""

from __future__ import annotations

import re
import unicodedata

import regex

UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Line_Break=Complex_Context}"
    r"\u30fc\uff70"  # the prolonged sound mark, which Japanese shares among its scripts
)
"""A character class, less its brackets: letters of scripts without blanks between words."""

_LETTER = rf"[\w\p{{No}}--[{UNSPACED}]]"
_FIRST = rf"[\w\p{{No}}--[{UNSPACED}\p{{M}}\p{{Cf}}]]"
_SIGN = rf"(?=[{UNSPACED}])\X"
# Between letters the marks that UAX 29 calls MidLetter: a Catalan middle dot, Hebrew gershayim.
_JOINED = rf"(?:['’]|(?<=[\p{{L}}\p{{M}}])[·‧״](?=\p{{L}})){_LETTER}+"
_WORD = regex.compile(rf"(?V1){_SIGN}|{_FIRST}{_LETTER}*(?:{_JOINED})*")
_ASCII = re.compile(r"\w+(?:'\w+)*", re.ASCII)  # the same, four times as fast
_PIECE = regex.compile(rf"(?V1){_SIGN}|[^\s{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Lower-case words, composed (NFC), so that one spelt with combining accents equals one spelt without."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFC", text).lower())]


def pieces(text: str) -> list[str]:
    """What stands between blanks, as ``text.split()``, but each sign of a script without blanks by itself."""
    if text.isascii():
        return text.split()
    return [str(piece) for piece in _PIECE.findall(text)]
