"""The rules of :mod:`rankalign.data.lint`: what each looks at and when it speaks.

L1xx look at one answer, L2xx at the answers of one prompt, L3xx at their scores, L4xx at the whole set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import regex

from rankalign.data.lint.control import found_in
from rankalign.data.lint.remnants import html_in, languages_in, script_of
from rankalign.data.lint.whole import HeldOut, LengthDecides, SamePrompt, Unread, Watch
from rankalign.data.messages import message_text, text_of
from rankalign.data.records import CandidateSet, judges
from rankalign.data.templates import is_rendered
from rankalign.data.words import pieces
from rankalign.storage.places import Places

EOS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<eos>", "<end_of_turn>")
BOS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>")
TURNS = ("\n\nHuman:", "\nHuman:", "\nUser:", "\nUSER:", "### Instruction:", "<|im_start|>", "<|prompter|>", "[INST]")
# What judges are asked to write, or are shown: MT-bench, Arena-Hard, FastChat, graders of many kinds, AlpacaFarm.
_JUDGE = re.compile(
    r"\[\[(?:[ABC]|\d+(?:\.\d+)?|[AB]>+[AB]|A=B)\]\]"
    r"|\[The (?:Start|End) of Assistant"
    r"|\b(?:Rating|Score|Overall score)\s*:\s*\d+(?:\.\d+)?\s*/\s*\d+"
    r"|\bOutput \([ab]\) is (?:better|preferred)"
)
# An answer that was cut ends inside a sentence: in a letter or digit, behind a comma or an opening bracket.
_INSIDE = regex.compile(r"[\p{L}\p{M}\p{N},;\-–(،、，；（]$")
# A prompt that asks for two languages.
_TRANSLATE = re.compile(r"transl|übersetz|traduc|tradui|tradu[zç]|vertaal|перев|翻译|翻訳", re.IGNORECASE)
TRUNCATED_WORDS, REPEATED_WORDS, LEAK_LENGTH = 20, 50, 20


Seen = Iterator[tuple[int | None, str]]
RecordCheck = Callable[[CandidateSet], Seen]


@dataclass(frozen=True)
class Rule:
    """A rule: one of the two checks is set, or none where it is only looked for on demand.

    Attributes:
        code: its name in reports.
        summary: one line for people.
        record: looks at one record, yields a response's index (or None) and what was seen.
        whole: makes what looks at all records, from the prompts held out.
        fixable: whether :func:`fix` mends it.
    """

    code: str
    summary: str
    record: RecordCheck | None = None
    whole: Callable[[Places], Watch] | None = None
    fixable: bool = False


def without_bos(text: str) -> str:
    """``text`` less the marks of a text's begin before it."""
    while mark := next((mark for mark in BOS if text.startswith(mark)), ""):
        text = text.removeprefix(mark)
    return text


def without_eos(text: str) -> str:
    """``text`` less the marks of a text's end behind it."""
    while mark := next((mark for mark in EOS if text.rstrip().endswith(mark)), ""):
        text = text.rstrip().removesuffix(mark)
    return text


# --- L1xx: one answer --------------------------------------------------------------------------------------------


def _answers(test: Callable[[str], str]) -> RecordCheck:
    """A check of each answer's text by ``test``, which says what it saw or nothing."""

    def check(record: CandidateSet) -> Seen:
        for index, response in enumerate(record.responses):
            if seen := test(response.shown(thoughts=True)):
                yield index, seen

    return check


def _empty(text: str) -> str:
    return "" if text.strip() else "holds no text"


def _looks_cut(record: CandidateSet) -> Seen:
    for index, response in enumerate(record.responses):
        text = response.text.rstrip()
        last = pieces(text.rpartition("\n")[2])
        long = len(pieces(text)) >= TRUNCATED_WORDS and len(last) >= 5
        # A vowel sign ends a word as a letter does; Thai and Lao end sentences with no sign at all.
        if response.finished and long and _INSIDE.search(text) and script(text) not in ("THAI", "LAO"):
            yield index, f"counts as finished but ends with {' '.join(last[-3:])!r}"


def control_rules(names: Sequence[str] = ()) -> list[Rule]:
    """The rules for control tokens that texts spell: published ones, and those of ``names``."""

    def in_answer(text: str) -> str:
        inside = found_in(without_bos(without_eos(text)), names)
        return f"holds {', '.join(inside)}" if inside else ""

    def in_prompt(record: CandidateSet) -> Seen:
        parts = (
            [record.prompt]
            if isinstance(record.prompt, str)
            else [message_text(m, thoughts=True) for m in record.prompt]
        )
        bare = [without_bos(part) for part in parts if not is_rendered(part)]
        if inside := sorted({name for part in bare for name in found_in(part, names)}):
            yield None, f"the prompt spells {', '.join(inside)}"

    return [
        Rule("L103", "text of special tokens inside an answer", _answers(in_answer)),
        Rule("L112", "text of special tokens inside a prompt", in_prompt),
    ]


def _eos(text: str) -> str:
    bare = without_eos(text)
    return f"ends with {text.rstrip()[len(bare.rstrip()) :].strip()!r}" if bare != text else ""


def _bos(record: CandidateSet) -> Seen:
    prompt = record.prompt if isinstance(record.prompt, str) else ""
    if without_bos(prompt) != prompt:
        yield None, "the prompt begins with a mark that the tokenizer adds again"
    for index, response in enumerate(record.responses):
        if without_bos(response.text) != response.text:
            yield index, "begins with the mark of a text's begin"


def _repeats_prompt(record: CandidateSet) -> Seen:
    asked = _squeezed(record.prompt if isinstance(record.prompt, str) else text_of(record.prompt[-1]))
    if len(asked) < LEAK_LENGTH:
        return
    for index, response in enumerate(record.responses):
        if _squeezed(response.text).startswith(asked):
            yield index, "begins by repeating the prompt"


def _next_turn(text: str) -> str:
    found = [mark.strip() for mark in TURNS if mark in text]
    return f"goes on into another turn ({', '.join(sorted(set(found)))})" if found else ""


def _judge_residue(text: str) -> str:
    found = _JUDGE.search(text)
    return f"speaks as a judge: {found.group()!r}" if found else ""


def _loops(text: str) -> str:
    words = pieces(text)
    if len(words) < REPEATED_WORDS:
        return ""
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    share = len(set(grams)) / len(grams)
    return f"repeats itself: {share:.0%} of its four-word runs are different" if share < 0.3 else ""


def _replaced(text: str) -> str:
    count = text.count("\ufffd")
    return f"holds U+FFFD {count} times, where a decoder gave up" if count else ""


def script(text: str) -> str:
    """The script of most of a text's letters (``LATIN``, ``CJK``, ...); empty where it is mixed or short."""
    letters = list(islice(filter(str.isalpha, text), 400))
    if len(letters) < 20:
        return ""
    names = Counter(map(script_of, letters))
    name, count = names.most_common(1)[0]
    return name if count >= 0.7 * len(letters) else ""


def _other_script(record: CandidateSet) -> Seen:
    prompt = record.prompt if isinstance(record.prompt, str) else text_of(record.prompt[-1])
    if not (asked := script(prompt)):
        return
    for index, response in enumerate(record.responses):
        if (answered := script(response.words())) and answered != asked:
            yield index, f"is {answered.title()} where the prompt is {asked.title()}"


def _html(record: CandidateSet) -> Seen:
    if html_in(_asked(record)):
        return  # who writes HTML asks for it
    for index, response in enumerate(record.responses):
        if found := html_in(response.words()):
            yield index, f"holds {', '.join(found[:3])}"


def _mixed_languages(record: CandidateSet) -> Seen:
    asked = _asked(record)
    if languages_in(asked) or _TRANSLATE.search(asked):
        return
    for index, response in enumerate(record.responses):
        if found := languages_in(response.words()):
            yield index, f"goes from {' to '.join(found)}"


def _asked(record: CandidateSet) -> str:
    return record.prompt if isinstance(record.prompt, str) else text_of(record.prompt[-1])


# --- L2xx: the answers of one prompt -----------------------------------------------------------------------------


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _identical(record: CandidateSet) -> Seen:
    first: dict[str, int] = {}
    for index, response in enumerate(record.responses):
        if (earlier := first.setdefault(response.shown(thoughts=True), index)) != index:
            yield index, f"is the same text as response {earlier}"


def _differ_in_space(record: CandidateSet) -> Seen:
    first: dict[str, int] = {}
    for index, response in enumerate(record.responses):
        earlier = first.setdefault(_squeezed(response.shown(thoughts=True)), index)
        if response.shown(thoughts=True) != record.responses[earlier].shown(thoughts=True):
            yield index, f"differs from response {earlier} in white space alone"


def _cut_prompt(record: CandidateSet) -> Seen:
    note = record.meta.get("trl")
    implicit = isinstance(note, dict) and note.get("implicit")
    if implicit and isinstance(record.prompt, str) and record.prompt[-1:].isalnum():
        yield (
            None,
            f"the prompt was guessed from two texts and ends with {record.prompt.split()[-1]!r}; give it a column",
        )


# --- L3xx: scores ------------------------------------------------------------------------------------------------


def _opposed(record: CandidateSet) -> Seen:
    for one, other in combinations(judges([record]), 2):
        shared = [
            (a, b)
            for a, b in zip(record.scores(one), record.scores(other), strict=True)
            if a is not None and b is not None
        ]
        signs = [_sign(x[0] - y[0]) * _sign(x[1] - y[1]) for x, y in combinations(shared, 2)]
        against, along = signs.count(-1), signs.count(1)
        if against > along:
            yield None, f"judges {one!r} and {other!r} order {against} of {against + along} pairs the other way round"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _all_tied(record: CandidateSet) -> Seen:
    for judge in judges([record]):
        known = [score for score in record.scores(judge) if score is not None]
        if len(known) > 1 and len(set(known)) == 1:
            yield None, f"judge {judge!r} gives all {len(known)} answers {known[0]:g}"


def _partly_scored(record: CandidateSet) -> Seen:
    for judge in judges([record]):
        for index, score in enumerate(record.scores(judge)):
            if score is None:
                yield index, f"has no score by {judge!r}, others have"


def _overall_against_aspects(record: CandidateSet) -> Seen:
    for index, response in enumerate(record.responses):
        # `overall_score` and `fine-grained_score` of UltraFeedback are no aspects.
        aspects = [s for judge, s in response.scores.items() if s is not None and not judge.endswith("_score")]
        overall = response.scores.get("overall_score")
        # Some 2,000 answers that UltraFeedback's judge gave a 1 are stored with a 10.
        if overall is not None and overall >= 9 and len(aspects) > 1 and sum(aspects) / len(aspects) <= 2:
            mean = sum(aspects) / len(aspects)
            yield index, f"overall {overall:g} beside aspects of {mean:.1f} on average: a 1 stored as 10?"


RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule("L101", "empty answer", _answers(_empty)),
        Rule("L102", "answer that looks cut off but counts as finished", _looks_cut),
        control_rules()[0],
        Rule("L104", "answer that goes on into another turn", _answers(_next_turn)),
        Rule("L105", "end-of-text mark at the end of an answer; training adds one", _answers(_eos), fixable=True),
        Rule("L106", "begin-of-text mark before a prompt or answer", _bos, fixable=True),
        Rule("L107", "answer that begins by repeating the prompt", _repeats_prompt),
        Rule("L108", "residue of a judge's verdict in an answer", _answers(_judge_residue)),
        Rule("L109", "answer that repeats itself", _answers(_loops)),
        Rule("L110", "replacement characters of a failed decoding", _answers(_replaced)),
        Rule("L111", "answer in another script than the prompt", _other_script),
        control_rules()[1],
        Rule("L113", "HTML left in an answer to a prompt without any", _html),
        Rule("L114", "answer that changes its language", _mixed_languages),
        Rule("L201", "identical answers to one prompt", _identical, fixable=True),
        Rule("L202", "answers that differ in white space alone", _differ_in_space),
        Rule("L203", "implicit prompt that ends within a line", _cut_prompt),
        Rule("L301", "two judges that order the answers oppositely", _opposed),
        Rule("L302", "all answers tied", _all_tied),
        Rule("L303", "answers without a score beside scored ones", _partly_scored),
        Rule("L304", "overall score that contradicts the rated aspects", _overall_against_aspects),
        Rule("L401", "prompt that stands in the set twice", whole=SamePrompt),
        Rule("L402", "prompt that stands in the held-out set", whole=HeldOut),
        Rule("L403", "the longer answer is mostly the better one", whole=LengthDecides),
        Rule("L404", "column that nothing reads and that could hold an answer or a verdict", whole=Unread),
        Rule("L405", "prompt that nearly repeats another one; looked for with --near_duplicates"),
        Rule("L406", "prompt that shares a long run of words with an evaluation set; looked for with --against"),
    )
}
