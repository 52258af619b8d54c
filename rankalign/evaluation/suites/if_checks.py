"""Instructions that a function can check, by the names and arguments of IFEval (Zhou et al. 2023, arXiv:2311.07911).

Each check takes the answer and the instruction's arguments and says whether it was followed. Words of the arguments are
taken as they stand, where the paper's code makes patterns of them. Three rules rest on packages that are not needed
here: sentences are counted by a splitter of our own (the paper's is NLTK's Punkt), words in capitals by the word, and
languages by ``langdetect`` where it is installed (extra ``suites``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

Check = Callable[..., bool | None]
"""True, False, or None where nothing here can tell."""

_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Co|vs|etc|No|Fig|e\.g|i\.e|U\.S|a\.m|p\.m)\.|\b[A-Z]\.|\d\.(?=\d)"
)
_END = re.compile(r"[.!?…]+[\"')\]”’]*(?=\s|$)|[。！？]+")


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Texts that end in a stop, a question or an exclamation mark, abbreviations aside; a rest without one counts."""
    whole = _ABBREVIATION.sub(lambda found: found[0].replace(".", "\x00"), text)
    parts = [part for part in _END.split(whole) if re.search(r"\w", part)]
    return len(parts)


def _related(number: int, relation: str, least: int) -> bool:
    return number < least if relation == "less than" else number >= least


def keywords(text: str, keywords: Sequence[str]) -> bool:
    """All of them stand in the text, in any case."""
    return all(word.lower() in text.lower() for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """How often a keyword stands there."""
    return _related(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words stands in the text as a word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """How often a letter (or sign) stands there, in any case."""
    return _related(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def language(text: str, language: str) -> bool | None:
    """The language of the whole text; what no detector can name counts as followed, as in the paper's code."""
    found = _language(text)
    return None if found is None else found in ("", language)


def sentences(text: str, num_sentences: int, relation: str) -> bool:
    """How many sentences."""
    return _related(count_sentences(text), relation, num_sentences)


def paragraphs(text: str, num_paragraphs: int) -> bool:
    """So many paragraphs between lines of three stars; an empty one in the middle is a fault."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = [part for part in parts[1:-1] if not part.strip()]
    return not inner and sum(bool(part.strip()) for part in parts) == num_paragraphs


def words(text: str, num_words: int, relation: str) -> bool:
    """How many words."""
    return _related(count_words(text), relation, num_words)


def first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs between blank lines, and with what word one of them begins."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not (own := parts[nth_paragraph - 1].split()):
        return False
    begin = re.split(r"[.,?!'\"]", own[0].lstrip("'").lstrip('"'), maxsplit=1)[0].lower()
    return count == num_paragraphs and begin == first_word.lower()


def placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many places in square brackets."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """A postscript with its mark."""
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    mark = postscript_marker.strip()
    return re.search(known.get(mark, re.escape(mark.lower())), text.lower()) is not None


def bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many bullets, of stars or hyphens."""
    found = re.findall(r"^\s*\*[^\*].*$|^\s*-.*$", text, re.MULTILINE)
    return len(found) == num_bullets


def constrained(text: str) -> bool:
    """One of three answers."""
    return any(said in text for said in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def highlights(text: str, num_highlights: int) -> bool:
    """At least so many passages between stars; double stars count again."""
    single = [found for found in re.findall(r"\*[^\n\*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*([^\n\*]*)\*\*", text) if found.strip()]
    return len(single) + len(double) >= num_highlights


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings of a word and a number."""
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


def json_text(text: str) -> bool:
    """All of it is JSON, between backticks perhaps."""
    bare = re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", text.strip()).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A title between double angle brackets."""
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    """Two different answers, six stars between them."""
    parts = text.split("******")
    told = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(told) == 2 and told[0] != told[1]


def repeated(text: str, prompt_to_repeat: str) -> bool:
    """The request stands at the beginning, word for word."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends(text: str, end_phrase: str) -> bool:
    """The last words."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """How many words are all in capitals; one with hyphens is one word."""
    found = [word for word in re.findall(r"\w[\w'’.-]*\w|\w", text) if word.isupper()]
    return _related(len(found), capital_relation, capital_frequency)


def upper(text: str) -> bool:
    """English, all in capitals; without a detector only these."""
    return text.isupper() and _language(text) in (None, "", "en")


def lower(text: str) -> bool:
    """English, without capitals; without a detector only that."""
    return text.islower() and _language(text) in (None, "", "en")


def no_comma(text: str) -> bool:
    """Not one comma."""
    return "," not in text


def quoted(text: str) -> bool:
    """All of it between double quotation marks."""
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": keywords,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden,
    "keywords:letter_frequency": letters,
    "language:response_language": language,
    "length_constraints:number_sentences": sentences,
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:number_words": words,
    "length_constraints:nth_paragraph_first_word": first_word,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": constrained,
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": json_text,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeated,
    "startend:end_checker": ends,
    "startend:quotation": quoted,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": upper,
    "change_case:english_lowercase": lower,
    "punctuation:no_comma": no_comma,
}


def variants(text: str) -> list[str]:
    """What the loose rule tries: the answer without its first line, its last, both, each with and without stars."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(part.replace("*", "") for part in cut)]


# --- languages --------------------------------------------------------------------------------------


def detects_languages() -> bool:
    """Whether there is a detector."""
    return _language("") is not None


def _language(text: str) -> str | None:
    """The language's code; empty where there is nothing to tell by, None without a detector."""
    try:
        import langdetect
    except ImportError:
        return None
    try:
        langdetect.DetectorFactory.seed = 0
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return ""
