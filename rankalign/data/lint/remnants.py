"""What a text was before it was one: tags and entities of HTML, and languages that change on the way."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_NAMES = "p|div|span|a|b|i|u|em|strong|li|ul|ol|h[1-6]|table|tr|td|th|tbody|blockquote|pre|code|img|sup|sub|font|center"
# An opening tag alone may be a type (`List<a>`) or a placeholder (`<b>`); one with an attribute is neither.
_HTML = re.compile(
    rf"</(?:{_NAMES})\s*>|<(?:br|hr)\s*/?>|<(?:{_NAMES})\s+[a-z-]+\s*=[^<>]*>|&(?:nbsp|amp|quot|lt|gt|apos|#\d+|#x[\da-f]+);",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:[A-Za-z]+[ ,;'’-]+){5}[A-Za-z]+")  # six words in a row
# Words of a language that none of the others has; names and borrowed words are not among them.
_WORDS = {
    "English": "the and is are of that this with you for not have was they which would there their from it",
    "German": "der die das und ist nicht ein eine mit auf für den dem von sich auch wird sind oder bei",
    "French": "le les des est une dans pour pas vous qui sur avec sont cette nous être mais leur aux ces",
    "Spanish": "el los las una por para con del que como más pero sus este esta son también puede muy hay",
    "Italian": "il gli della che di non per sono una con più anche questo nella come dei alla sua essere degli",
    "Portuguese": "o os uma não para com que por mais como dos das também são você pode seu sua isso muito",
    "Dutch": "de het een van en niet zijn dat voor met op aan ook wordt bij naar deze kan worden maar",
}
_ONLY = {
    name: set(words.split()) - {w for other, more in _WORDS.items() if other != name for w in more.split()}
    for name, words in _WORDS.items()
}
_TOGETHER = (
    {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "HALFWIDTH"},
)  # written side by side in one language
LETTERS, HITS = 12, 4
"""Letters of another script, and different words of another language, from which they are no quotation."""


def html_in(text: str) -> list[str]:
    """Tags and entities of HTML outside of code, each once, as they stand."""
    return list(dict.fromkeys(found.group() for found in _HTML.finditer(_CODE.sub(" ", text))))


def scripts_in(text: str) -> Counter[str]:
    """Letters by script; those that one language mixes count as one."""
    found: Counter[str] = Counter()
    for char, count in Counter(text).items():  # a text has few letters that differ
        if char.isalpha():
            name = script_of(char)
            found[next((min(group) for group in _TOGETHER if name in group), name)] += count
    return found


@functools.lru_cache(maxsize=1 << 16)
def script_of(letter: str) -> str:
    """The script of a letter, as Unicode's name of it begins."""
    return "LATIN" if letter.isascii() else unicodedata.name(letter, "UNKNOWN").split()[0]


def language(text: str) -> str:
    """The language of a paragraph in Latin letters, by its small words; empty where it is short or not told."""
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    hits = {name: len(words & only) for name, only in _ONLY.items()}
    first, second = sorted(hits, key=lambda name: -hits[name])[:2]
    return first if hits[first] >= HITS and hits[first] >= 3 * hits[second] else ""


def languages_in(text: str) -> list[str]:
    """The languages or scripts of a text, in order, where there are several; empty where it keeps to one."""
    bare = _CODE.sub(" ", text)
    scripts = scripts_in(bare)
    main = scripts.most_common(1)[0][0] if scripts else ""
    # Names and terms in Latin letters stand in every language, sentences do not.
    others = [name for name, count in scripts.items() if name not in (main, "LATIN") and count >= LETTERS]
    others += ["LATIN"] if main != "LATIN" and _SENTENCE.search(bare) else []
    if others:
        return [main.title(), *(name.title() for name in others)]
    spoken = list(dict.fromkeys(filter(None, map(language, re.split(r"\n\s*\n|(?<=[.!?])\s+", bare)))))
    return spoken if len(spoken) > 1 else []
