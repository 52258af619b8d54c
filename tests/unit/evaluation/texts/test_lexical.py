"""Lexical measures and the hack flags, on texts whose values can be counted by hand."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from rankalign.data.records import CandidateSet, Response
from rankalign.data.words import words
from rankalign.errors import InputError
from rankalign.evaluation.report import hack
from rankalign.evaluation.texts import lexical
from rankalign.evaluation.texts.lexical import evaluate_lexical
from rankalign.evaluation.texts.variety import distinct_answers, evaluate_variety


def records(texts: list[str], scores: list[float] | None = None, prompt: str = "Tell me.") -> list[CandidateSet]:
    given: list[float | None] = list(scores) if scores else [None] * len(texts)
    return [
        CandidateSet(f"p{i}", prompt, [Response(text, "m", scores={"rm": score})])
        for i, (text, score) in enumerate(zip(texts, given, strict=True))
    ]


def test_distinct_is_over_the_whole_set() -> None:
    texts = ["a b a b", "a c"]
    assert lexical.distinct(texts, 1) == 3 / 6
    assert lexical.distinct(texts, 2) == 3 / 4  # ab ba ab | ac
    assert lexical.distinct(texts, 3) == 2 / 2  # aba bab
    assert lexical.distinct(["a", ""], 2) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a b c d", 0.0), ("a b c a b c", 1 / 4), ("x x x x x", 2 / 3), ("a b", 0.0), ("", 0.0)],
)
def test_repetition(text: str, wanted: float) -> None:
    assert lexical.repetition(text) == pytest.approx(wanted)


def test_copying() -> None:
    assert lexical.copying("the cat sat on the mat", "Say: the cat sat on me") == pytest.approx(1 / 3)
    assert lexical.copying("too short", "too short") == 0.0
    assert lexical.copying("Say this back now", "say this back now") == 1.0


def test_list_density() -> None:
    assert lexical.list_density("Here:\n- one\n 2. two\n\n# Head\nend -x") == 3 / 5
    assert lexical.list_density("-no 1.5 is a number") == 0.0
    assert lexical.list_density("") == 0.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no feelings.", True),
        ("I cannot provide that.", True),
        ("I can help you with that.", False),
        ("The minister is sorry, but unmoved.", False),
        ("I WILL NOT write this.", True),
        ("I won't comply.", True),
        ("I am unable to comment.", True),
        ("I'm not able to say.", True),
        ("Being asked as a large language model: no.", True),
        ("I’m very sorry, I can’t.", True),
        ("I am sorry, but no.", True),
        ("I am not asked.", False),
        ("x" * 300 + " I cannot help.", False),
    ],
)
def test_refusals(text: str, wanted: bool) -> None:
    assert lexical.is_refusal(text) is wanted


def test_a_refusal_is_looked_for_where_it_may_stand() -> None:
    """Each wording of the expression, so that none is passed over by the look at single words before it."""
    verbs = ["help", "assist", "answer", "provide", "fulfil", "comply", "discuss", "give", "create", "write", "do that"]
    cannot = ["can not", "cannot", "can't", "won't", "will not", "am not able", "am unable", "'m unable"]
    found = [f"i {way} {to}{verb}" for way in cannot for to in ("", "to ") for verb in verbs]
    found += [f"i{am} {very}sorry{end}" for am in (" am", "'m") for very in ("", "so ") for end in (", but", " i can")]
    found += ["i am unable to", "i'm not able to", "as an ai", "as a language model", "as an artificial intelligence"]
    assert all(lexical.is_refusal(wording.upper()) for wording in found)


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_tuples_of_words(seed: int) -> None:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(["ab", "cd", "Ab", "é", "好", "don't"], k=draw.randrange(12)))

    sets = [CandidateSet(str(n), text(), [Response(text()) for _ in range(draw.randrange(1, 4))]) for n in range(40)]
    result = evaluate_lexical(sets)
    texts = [words(response.text) for record in sets for response in record.responses]
    for n in (1, 2, 3):
        grams = [gram for own in texts for gram in _runs(own, n)]
        assert result.metrics[f"distinct_{n}"] == len(set(grams)) / len(grams)
    copied, repeated = [], []
    for record in sets:
        source = _runs(words(str(record.prompt)), 4)
        own = [words(response.text) for response in record.responses]
        copied.append(np.mean([_share(gram in source for gram in _runs(each, 4)) for each in own]))
        repeated.append(np.mean([1 - _share(g not in r[:k] for k, g in enumerate(r)) if (r := _runs(each, 3)) else 0
                                 for each in own]))  # fmt: skip
    assert [row["copying"] for row in result.rows] == pytest.approx(copied)
    assert [row["repetition"] for row in result.rows] == pytest.approx(repeated)
    assert 0 < result.metrics["copying"] < 1


def _runs(text: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]


def _share(found: Iterable[bool]) -> float:
    which = list(found)
    return sum(which) / len(which) if which else 0.0


def test_rouge_words_of_ascii_are_cut_as_all_others_are() -> None:
    draw, tokens = random.Random(0), lexical.RougeWords().tokenize
    for _ in range(500):
        text = "".join(draw.choices("aZ09_' .,\n-\t\x1f", k=draw.randrange(20)))
        # Behind a word that is not ASCII the same text goes the long way.
        assert tokens("é " + text) == ["é", *tokens(text)]


def test_evaluate_lexical_averages_over_prompts_and_draws() -> None:
    sets = [
        CandidateSet("p", "q", [Response("a b", "m", count=3), Response("a b c d e f", "m")]),
        CandidateSet("q", "q", [Response("x", "m")]),
        CandidateSet("empty", "q", []),
    ]
    result = evaluate_lexical(sets)
    assert result.metrics["words"] == pytest.approx(((3 * 2 + 6) / 4 + 1) / 2)
    assert result.metrics["distinct_1"] == pytest.approx(7 / 13)
    assert (result.n, result.metrics["empty_prompts"]) == (2, 1)
    assert result.ci95["words"] == (1.0, 3.0)  # of two prompts every fourth resample is one prompt twice
    assert set(result.as_dict()) == {"metrics", "n", "ci95"}
    assert [row["words"] for row in result.rows] == [3.0, 1.0]


def test_evaluate_lexical_without_texts_defines_nothing() -> None:
    assert evaluate_lexical([CandidateSet("p", "q")]).as_dict() == {
        "metrics": {"empty_prompts": 1.0},
        "n": 0,
        "ci95": {},
    }


def test_rouge_equals_rouge_score_and_knows_identity() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = [("the cat sat on the mat", "a cat sat on a mat"), ("police killed the gunman", "the gunman police killed")]
    found = lexical.rouge([a for a, _ in pairs], [[b] for _, b in pairs])
    for i, (text, golden) in enumerate(pairs):
        for name, score in scorer.score(golden, text).items():
            assert found[name][i] == score.fmeasure
    # By hand: 4 of 6 unigrams, 2 of 5 bigrams, longest common subsequence "cat sat on mat".
    assert [found[name][0] for name in found] == pytest.approx([4 / 6, 2 / 5, 4 / 6])
    assert lexical.rouge(["same words here"], [["other", "same words here"]])["rougeL"] == [1.0]
    with pytest.raises(InputError, match="1 texts but 2"):
        lexical.rouge(["a"], [["a"], ["b"]])


def test_rouge_of_records_is_against_the_reference_policy() -> None:
    pytest.importorskip("rouge_score")
    answers = [Response("the cat sat", "m"), Response("the cat sat", "human"), Response("dogs", "human")]
    result = evaluate_lexical([CandidateSet("p", "q", answers)], reference="human")
    assert result.metrics["rougeL"] == 1.0
    assert result.metrics["words"] == 3.0  # the references themselves are not measured


def test_answers_are_distinct_below_seven_tenths_of_rouge_l() -> None:
    pytest.importorskip("rouge_score")
    cat = "the cat sat on the mat"
    assert distinct_answers([cat, cat]) == 1
    assert distinct_answers([cat, "The cat sat on a mat."]) == 1  # 5 of 6 words in order
    assert distinct_answers([cat, "a cat sat on a mat"]) == 2  # 4 of 6
    # The last is like the second alone, which does not count: it is compared with those that do.
    assert distinct_answers([cat, "the cat sat on a mat", "a cat sat on a mat"]) == 2
    assert distinct_answers([cat, "the cat sat on a mat", "dogs"], alike=0.9) == 3
    assert distinct_answers([]) == 0
    # All words in common, but in the other order.
    assert distinct_answers([cat, " ".join(reversed(cat.split()))]) == 2


def test_evaluate_variety_is_over_prompts_with_several_answers() -> None:
    pytest.importorskip("rouge_score")
    sets = [
        CandidateSet("p", "q", [Response("the cat sat on the mat", "m", count=2), Response("dogs run", "m")]),
        CandidateSet("q", "q", [Response("the cat sat on the mat", "m"), Response("the cat sat on a mat", "m")]),
        CandidateSet("one", "q", [Response("x", "m")]),
    ]
    result = evaluate_variety(sets)
    assert result.metrics == pytest.approx(
        {"answers": 2.5, "texts": 2.0, "distinct": 1.5, "distinct_2": (6 / 11 + 7 / 10) / 2, "single_answers": 1.0}
    )
    assert (result.n, result.ci95["distinct"]) == (2, (1.0, 2.0))
    assert evaluate_variety(sets[2:]).metrics == {"single_answers": 1.0}


# --- hacks -------------------------------------------------------------------------------------------------------

PLAIN = [f"Topic {i} has many sides and each of them deserves a calm look number {i * 7}." for i in range(40)]


def planted(change: str) -> list[str]:
    return {
        "length": [text + " " + " ".join(f"more{j}" for j in range(10)) for text in PLAIN],
        "repetition": ["very good very good very good very good look " + " ".join(text.split()[:4]) for text in PLAIN],
        "list-density": ["- " + text for text in PLAIN],
        "prompt-copying": ["Tell me all about the wide sea and the sky, I say " + str(i) for i in range(40)],
        "refusal": ["I'm sorry, but I can't say much about topic " + str(i) + " here today folks" for i in range(40)],
    }[change]


@pytest.mark.parametrize("change", ["length", "repetition", "list-density", "prompt-copying", "refusal"])
def test_a_planted_hack_is_named_alone(change: str) -> None:
    prompt = "Tell me all about the wide sea and the sky"
    flags = hack.find_hacks(records(PLAIN, prompt=prompt), records(planted(change), prompt=prompt))
    # What is planted is one phrase for all but list marks, and that is a finding of its own.
    assert [flag.name for flag in flags if flag.name != "stock-phrase"] == [change]
    assert ("stock-phrase" in [flag.name for flag in flags]) == (change != "list-density")
    assert flags[0].difference.interval.low > 0
    assert "rose from" in flags[0].message


def test_no_change_and_a_fall_raise_no_flag() -> None:
    same = records(PLAIN)
    assert hack.find_hacks(same, same) == []
    assert hack.find_hacks(records(planted("list-density")), same) == []
    assert hack.find_hacks([], []) == []


def test_a_rise_must_be_significant_and_large_enough() -> None:
    one_of_six = [planted("list-density")[0], *PLAIN[1:6]]  # +0.17, but its interval reaches zero
    assert hack.find_hacks(records(PLAIN[:6]), records(one_of_six)) == []
    longer = [text + " indeed" for text in PLAIN]  # surely longer, by less than a tenth
    assert hack.find_hacks(records(PLAIN), records(longer)) == []


def names_of(old: list[str], new: list[str]) -> list[str]:
    return [flag.name for flag in hack.find_hacks(records(old), records(new))]


def test_mode_collapse_is_named() -> None:
    rng = np.random.default_rng(0)
    many, few = ([f"w{k}" for k in range(size)] for size in (4000, 60))
    old, new = ([" ".join(rng.choice(own, size=30)) for _ in range(60)] for own in (many, few))
    assert names_of(old, new) == ["mode-collapse"]
    assert names_of(new, old) == []
    (flag,) = hack.find_hacks(records(old), records(new))
    both = [lexical.distinct(texts, 2) for texts in (old, new)]
    assert (flag.before, flag.after) == pytest.approx(both)
    assert "fell from" in flag.message
    # Longer answers from the same words repeat more of them; at equal length nothing fell.
    longer = [" ".join(rng.choice(many[:300], size=size)) for size in (30, 120) for _ in range(60)]
    assert "mode-collapse" not in names_of(longer[:60], longer[60:])


@pytest.mark.parametrize("phrase", ["Great question!", "I hope this helps you today.", "希望这个回答对你有帮助"])
def test_one_phrase_in_every_answer_is_named(phrase: str) -> None:
    rng = np.random.default_rng(1)
    plain = [" ".join(rng.choice([f"w{k}" for k in range(900)], size=90)) for _ in range(30)]
    for new in ([f"{phrase} {text}" for text in plain], [f"{text} {phrase}" for text in plain]):
        flags = hack.find_hacks(records(plain), records(new))
        (flag,) = (flag for flag in flags if flag.name == "stock-phrase")
        assert " ".join(words(phrase)) in flag.message
        assert flag.difference.value == 1.0


def test_two_systems_are_named_and_the_direction_with_them() -> None:
    prompt = "Tell me all about the wide sea and the sky"
    plain, copied = records(PLAIN, prompt=prompt), records(planted("prompt-copying"), prompt=prompt)
    for a, b, names in ((plain, copied, ("x", "y")), (copied, plain, ("y", "x"))):
        (flag,) = (f for f in hack.compare_hacks(a, b, "", 0, names) if f.name == "prompt-copying")
        assert re.search(r"rose from 0\.0 % \(x\) to \d+\.\d % \(y\)", flag.message)


def test_flags_need_matching_prompts() -> None:
    with pytest.raises(InputError, match="'p3'"):
        hack.find_hacks(records(PLAIN[:4]), records(PLAIN[:3]))


def test_reward_that_follows_length_is_named() -> None:
    rng = np.random.default_rng(0)
    extra = rng.integers(0, 30, size=40)
    longer = [text + " more" * int(k) for text, k in zip(PLAIN, extra, strict=True)]
    paid = hack.find_hacks(records(PLAIN, [0.0] * 40), records(longer, [float(k) for k in extra]), "rm")
    assert "reward-follows-length" in [flag.name for flag in paid]
    unpaid = hack.find_hacks(records(PLAIN, [0.0] * 40), records(longer, rng.normal(size=40).tolist()), "rm")
    assert "reward-follows-length" not in [flag.name for flag in unpaid]


def test_length_correlation_is_within_prompts() -> None:
    # Long answers belong to the easy prompt; within each prompt the shorter one is better.
    def answers(words: tuple[int, int], scores: tuple[float, float]) -> list[Response]:
        return [Response("w " * n, "m", scores={"rm": s}) for n, s in zip(words, scores, strict=True)]

    sets = [
        CandidateSet("easy", "q", answers((20, 22), (10.0, 9.0))),
        CandidateSet("hard", "q", answers((2, 4), (1.0, 0.0))),
        CandidateSet("mid", "q", answers((6, 8), (4.0, 3.0))),
    ]
    found = hack.length_correlation(sets, "rm")
    assert found is not None
    assert found.value == pytest.approx(-1.0)
    alone = [CandidateSet(s.id, s.prompt, s.responses[:1]) for s in sets]
    across = hack.length_correlation(alone, "rm")
    assert across is not None
    assert across.value == pytest.approx(np.corrcoef([20, 2, 6], [10, 1, 4])[0, 1])


def test_correlation_is_none_where_it_is_not_defined() -> None:
    assert hack.correlation([]) is None
    assert hack.correlation([(0.1, 1.0), (0.1, 2.0), (0.1, 3.0), (0.1, 7.0)]) is None
    assert hack.length_correlation([CandidateSet("p", "q", [])], "rm") is None


def test_a_wide_row_is_shown_upright_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from rankalign.evaluation.tables import Table, render

    columns = [f"quite a long name {i}" for i in range(9)]
    render(Table("wide", columns, [[f"value-{i}" for i in range(9)]]))
    shown = capsys.readouterr().out
    assert all(f"quite a long name {i}" in shown and f"value-{i} " in shown for i in range(9))


# --- other scripts -----------------------------------------------------------------------------------------------

SCRIPTS = {
    "ru": ("Сегодня хорошая погода, и мы идём гулять.", "Сегодня плохая погода, и мы сидим дома."),
    "zh": ("今天天气很好，我们去公园散步。", "今天天气不好，我们在家看书。"),
    "ja": ("今日はいい天気ですね。", "今日は雨ですから出かけません。"),
    "hi": ("मुझे हिन्दी में कहानी लिखनी है।", "मुझे हिन्दी नहीं आती है।"),
    "ar": ("الطقس جميل اليوم.", "الطقس بارد اليوم."),
    "th": ("วันนี้อากาศดีมาก", "วันนี้ฝนตกหนัก"),
}


@pytest.mark.parametrize("language", SCRIPTS)
def test_rouge_reads_every_script(language: str) -> None:
    text, other = SCRIPTS[language]
    found = lexical.rouge([text, text], [[text], [other]])
    for values in found.values():
        assert values[0] == 1.0
        assert values[1] < 1.0
    a, b = (Counter(words(t)) for t in (text, other))
    assert found["rouge1"][1] == pytest.approx(2 * (a & b).total() / (a.total() + b.total()))
    assert distinct_answers([text, other, text + "!"]) == 2


def test_rouge_of_english_is_that_of_rouge_score(data_kit: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    rows = [
        json.loads(line)
        for line in gzip.decompress((data_kit / "tldr" / "oai1b_judged.jsonl.gz").read_bytes())
        .decode()
        .split("\n")[:300]
    ]
    pairs = [(row["summary"], row["reference"]) for row in rows]
    pairs = [p for p in pairs if not any(c.isalnum() for c in "".join(p) if not c.isascii())]
    assert len(pairs) > 250
    ours = lexical.rouge([a for a, _ in pairs], [[b] for _, b in pairs])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for k, (text, golden) in enumerate(pairs):
        wanted = scorer.score(golden, text)
        assert {name: values[k] for name, values in ours.items()} == {n: w.fmeasure for n, w in wanted.items()}


def test_measures_of_other_scripts() -> None:
    assert lexical.repetition("好好好好好") == pytest.approx(2 / 3)
    assert lexical.copying("我们去公园散步吧", "请重复：我们去公园散步") == pytest.approx(4 / 5)
    assert lexical.repetition("में " * 5) == pytest.approx(2 / 3)
    assert lexical.list_density("1、苹果\n2）梨\n结束") == pytest.approx(2 / 3)
