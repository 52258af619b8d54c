"""Every rule speaks on its fixture and is silent on the nearest thing that is fine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankalign.cli import main
from rankalign.data.convert import Intake, load
from rankalign.data.lint import RULES, Finding, fix, lint
from rankalign.data.lint.remnants import language, languages_in
from rankalign.data.lint.rules import script
from rankalign.data.lint.whole import longest_answer
from rankalign.data.records import CandidateSet, Response, write
from rankalign.data.shares import wilson

LONG = "This answer has a good many words in it so that the rule about answers cut off in the middle looks at"
RUSSIAN = "Небо голубое, потому что воздух рассеивает синий свет сильнее"


def made(*texts: str, prompt: Any = "Why is the sky blue at noon?", **fields: Any) -> CandidateSet:
    return CandidateSet("one", prompt, [Response(text, **fields) for text in texts])


def scored(*scores: Any, judge: str = "rm", texts: str = "abcdefgh") -> CandidateSet:
    pairs = zip(texts, scores, strict=False)
    return CandidateSet("one", "p", [Response(text, scores={judge: score}) for text, score in pairs])


def judged(one: list[float | None], other: list[float | None]) -> CandidateSet:
    both = zip("abcdefgh", one, other, strict=False)
    return CandidateSet("one", "p", [Response(text, scores={"x": x, "y": y}) for text, x, y in both])


def implicit(prompt: str) -> CandidateSet:
    return CandidateSet("one", prompt, [], {"trl": {"implicit": True}})


def rated(overall: float, *aspects: float) -> CandidateSet:
    scores = {f"aspect{index}": value for index, value in enumerate(aspects)}
    return CandidateSet("one", "p", [Response("a", scores={"overall_score": overall, **scores})])


def lengths(right: int, wrong: int) -> list[CandidateSet]:
    texts = [("long answer", "short")] * right + [("short", "long answer")] * wrong
    return [
        CandidateSet(f"n{i}", f"p{i}", [Response(a, scores={"rm": 1.0}), Response(b, scores={"rm": 0.0})])
        for i, (a, b) in enumerate(texts)
    ]


def extra(**meta: object) -> CandidateSet:
    return dataclasses.replace(made("a"), meta=meta)


# code: (records that it must name, the response it names, records that it must not name)
CASES: dict[str, tuple[list[CandidateSet], int | None, list[CandidateSet]]] = {
    "L101": ([made("fine.", " \n")], 1, [made("x")]),
    "L102": (
        [made(LONG)],
        0,
        [made(LONG + " it."), made(LONG, finished=False), made("A short one"), made(LONG + "\n- x")],
    ),
    "L103": ([made("a <|im_start|> b")], 0, [made("a </s>"), made("<s> a"), made("a <b> c | d"), made("[link]")]),
    "L104": ([made("Yes.\n\nHuman: And?")], 0, [made("The Human: a study"), made("User guide")]),
    "L105": ([made("ok", "ok.</s>")], 1, [made("Write </s> at the end.")]),
    "L106": ([made("<s>ok")], 0, [made("ok <s>")]),
    "L107": ([made("Why is the sky  blue at noon? It is.")], 0, [made("Is the sky blue?"), made("p is", prompt="p")]),
    "L108": ([made("So I say [[B]].")], 0, [made("See [1] and [[note]]."), made("The score: 3 to 1")]),
    "L109": ([made("la la la " * 30)], 0, [made(" ".join(map(str, range(90)))), made("la la la " * 5)]),
    "L110": ([made("caf\ufffd")], 0, [made("café")]),
    "L111": ([made("ok", RUSSIAN)], 1, [made("Небо"), made(RUSSIAN, prompt=RUSSIAN)]),
    "L112": (
        [made("a", prompt=[{"role": "user", "content": "What is <start_of_turn>?"}])],
        None,
        [made("a", prompt="<s>[INST] Why? [/INST]"), made("a", prompt="a <b> [c]")],
    ),
    "L113": (
        [made("It is &quot;blue&quot;.<br/>Really.")],
        0,
        [
            made("Use `<br>` here, or\n```html\n<p>x</p>\n```"),
            made("a List<a> of <b>"),
            made("So: <p>x</p>", prompt="What does <p>x</p> show?"),
        ],
    ),
    "L114": (
        [made("fine", "The sky is blue, and that is what you see. " + RUSSIAN)],
        1,
        [
            made("The word небо is Russian."),
            made(RUSSIAN + " (Rayleigh scattering)"),
            made("空は青いです。レイリー散乱のため、青い光が強く散乱されます。"),
            made("The sky is blue. " + RUSSIAN, prompt="Translate: the sky is blue"),
        ],
    ),
    "L201": ([made("same", "other", "same")], 2, [made("same", "Same")]),
    "L202": ([made("a b", "a  b")], 1, [made("a b", "a b"), made("a b", "ab")]),
    "L203": ([implicit("The sky is")], None, [implicit("Q: Why?\n"), made("a", prompt="The sky is")]),
    "L301": ([judged([3, 2, 1], [1, 2, 3])], None, [judged([3, 2, 1], [3, 1, 2]), judged([1, 2], [2, 2])]),
    "L302": ([scored(5, 5, None)], None, [scored(5, 5, 4), scored(5)]),
    "L303": ([scored(5, None)], 1, [scored(None, None), scored(1, 2)]),
    "L304": ([rated(10, 1, 2, 1)], 0, [rated(10, 5, 4), rated(1, 1, 1), rated(10, 1)]),
    "L401": ([made("a"), CandidateSet("two", "why is the  sky blue at noon?")], None, [made("a")]),
    "L403": (lengths(90, 10), None, lengths(60, 40)),
    "L404": ([extra(response_b="an answer")], None, [extra(source="s", prompt_id=3), extra(score=None, tools="[]")]),
}


@pytest.mark.parametrize("code", CASES)
def test_a_rule_speaks_where_it_should(code: str) -> None:
    sets, response, _ = CASES[code]
    (finding,) = lint(sets).findings[code]
    assert (finding.code, finding.response) == (code, response)
    assert finding.message


@pytest.mark.parametrize("code", CASES)
def test_a_rule_is_silent_where_it_should_be(code: str) -> None:
    fine = CASES[code][2]
    groups = [fine] if code == "L403" else [[record] for record in fine]
    assert groups
    for group in groups:
        assert code not in lint(group).findings


def test_every_rule_has_a_case_and_a_summary() -> None:
    assert set(RULES) == {*CASES, "L402", "L405", "L406"}
    assert all(rule.code == code and rule.summary for code, rule in RULES.items())


def test_held_out_prompts_are_found() -> None:
    train = [CandidateSet("a", "Why?"), CandidateSet("b", [{"role": "user", "content": "How  so?"}])]
    report = lint(train, held_out=[CandidateSet("t", "how so?")])
    assert report.findings["L402"] == [Finding("L402", "b", None, "its prompt stands in the held-out set")]
    assert "L402" not in lint(train).findings


def test_a_report_counts_by_code() -> None:
    report = lint([made("", "", "x")])
    assert (report.records, report.counts()) == (1, {"L101": 2, "L201": 1})
    assert lint([]).counts() == {}


# --- the longest answer ------------------------------------------------------------------------------------------


def test_the_longest_answer_baseline_by_hand() -> None:
    sets = [
        CandidateSet("1", "p", [Response("aaa", scores={"rm": 2}), Response("a", scores={"rm": 1})]),
        CandidateSet("2", "p", [Response("bb", scores={"rm": 0}), Response("b", scores={"rm": 3})]),
        CandidateSet("3", "p", [Response("cc", scores={"rm": 0}), Response("dd", scores={"rm": 3})]),
        CandidateSet("4", "p", [Response("e", scores={"rm": 1}), Response("ff", scores={"rm": 1}), Response("ggg")]),
    ]
    baseline = longest_answer(sets, "rm")
    assert (baseline.pairs, baseline.accuracy) == (3, 0.5)
    assert lint(sets).longest["rm"] == baseline


def test_a_judge_without_strict_pairs_has_no_baseline() -> None:
    baseline = longest_answer([scored(1, 1)], "rm")
    assert (baseline.pairs, baseline.accuracy, baseline.low) == (0, None, None)


@pytest.mark.parametrize(("share", "count", "low"), [(0.9, 10, 0.595850), (0.5, 100, 0.403832), (0.0, 10, 0.0)])
def test_wilson_intervals_equal_published_values(share: float, count: int, low: float) -> None:
    assert wilson(share, count)[0] == pytest.approx(low, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (RUSSIAN, "CYRILLIC"),
        ("x" * 30, "LATIN"),
        ("天" * 30, "CJK"),
        ("x" * 15 + "天" * 15, ""),
        ("short", ""),
        ("1" * 50, ""),
    ],
)
def test_scripts(text: str, name: str) -> None:
    assert script(text) == name


# --- fixing ------------------------------------------------------------------------------------------------------


def test_fix_cuts_marks_and_merges_equal_answers() -> None:
    tokens = {"tokenizer": "t", "ids": [1, 2]}
    record = CandidateSet(
        "one",
        "<s>Why?",
        [
            Response("ok</s></s>", tokens=tokens),
            Response("<s>ok", count=2),
            Response("ok", policy="other"),
            Response("ok", scores={"rm": 1}),
            Response("left", tokens=tokens),
        ],
        {"kept": 1},
    )
    (mended,), done = fix([record])
    assert (mended.id, mended.prompt, mended.meta) == ("one", "Why?", {"kept": 1})
    assert [(r.text, r.policy, r.count, r.tokens, r.scores) for r in mended.responses] == [
        ("ok", "unknown", 3, None, {}),
        ("ok", "other", 1, None, {}),
        ("ok", "unknown", 1, None, {"rm": 1}),
        ("left", "unknown", 1, tokens, {}),
    ]
    assert done == {"L105": 1, "L106": 2, "L201": 1}
    assert record.prompt == "<s>Why?"
    assert record.responses[0].text == "ok</s></s>"


TEXTS = st.lists(st.sampled_from(["ok", "ok</s>", "<s>ok", "<s>", "</s>x", "<s></s>", " a <|im_end|> "]), max_size=4)


@settings(deadline=None)
@given(texts=TEXTS, prompt=st.sampled_from(["p", "<s>p", "<s>"]))
def test_fixing_twice_changes_nothing_more(texts: list[str], prompt: str) -> None:
    once, _ = fix([made(*texts, prompt=prompt)])
    twice, done = fix(once)
    assert (twice, done) == (once, {})
    assert not {"L105"} & lint(once).findings.keys()
    assert sum(response.count for response in once[0].responses) == len(texts)


def test_fix_touches_only_what_rules_call_fixable() -> None:
    _, done = fix([made("", " ", "a b", "a  b", LONG, "Yes.\n\nHuman: And?", "caf\ufffd", "[[B]]")])
    assert done == {}
    assert {code for code, rule in RULES.items() if rule.fixable} == {"L105", "L106", "L201"}


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [
        ("minchatgpt/responses.jsonl", "minchatgpt", {"L101": 4, "L110": 14}),
        ("hh/webgpt_textscore.jsonl", "text-score", {"L302": 151}),
        ("gpt4llm/comparisons.jsonl", "gpt4-compare", {"L403": 1}),
        ("bon/tulu2_13b_bon.rrhf.jsonl.gz", "rrhf", {"L302": 1}),
    ],
)
def test_real_files(data_kit: Any, file: str, name: str, expected: dict[str, int]) -> None:
    counts = lint(load([data_kit / file], name, Intake(False))).counts()
    assert {code: counts.get(code, 0) for code in expected} == expected


@pytest.mark.parametrize(
    "name",
    ["<start_of_turn>", "<end_of_turn>", "<|im_end|>", "<|start_header_id|>", "<|end_of_text|>", "<\uff5cUser\uff5c>",
     "<|START_OF_TURN_TOKEN|>", "<|eot_id|>", "<EOS_TOKEN>", "[TOOL_CALLS]", "<|reserved_special_token_0|>", "[/INST]"],
)  # fmt: skip
def test_published_control_tokens_are_found_in_answers_and_prompts(name: str) -> None:
    record = made(f"a {name} b", prompt=f"a {name} b")
    assert {"L103", "L112"} <= set(lint([record]).counts())


def test_control_tokens_of_a_tokenizer_are_found_where_it_is_named() -> None:
    record = made("a @@turn@@ b", prompt="a @@turn@@ b")
    assert not {"L103", "L112"} & set(lint([record]).counts())
    assert {"L103", "L112"} <= set(lint([record], control=["@@turn@@"]).counts())


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("我们去公园散步" * 12, "L109"),
        ("हिन्दी में लिखो " * 20, "L109"),
        ("今天天气很好我们去公园散步因为那里有很多花", "L102"),
    ],
)
def test_rules_that_count_words_read_every_script(text: str, code: str) -> None:
    record = CandidateSet("a", "p", [Response(text, "m"), Response("好。", "m")])
    assert lint([record]).findings[code]


def test_languages_that_share_an_alphabet_are_told_apart() -> None:
    english = "It is blue for you and they have that from the light which there is."
    german = "Der Himmel ist blau und das ist nicht für den oder die von sich auch wird."
    assert language(english) == "English"
    assert language(german) == "German"
    assert languages_in(f"{english}\n\n{german}") == ["English", "German"]
    assert languages_in(f"{english} {english}") == []
    assert languages_in("Der Hund and the cat.") == []


def test_every_rule_has_its_section_and_is_pointed_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "lint.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (L\d+) (.*?)$", page, re.MULTILINE))
    assert sections == {code: rule.summary for code, rule in RULES.items()}
    bodies = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    assert all(len(body.split()) > 30 for body in bodies), "a section says what is seen, why it matters, what to do"
    write(tmp_path / "c.jsonl", [made("", "x")])
    assert main(["lint", str(tmp_path / "c.jsonl")]) == 0
    assert "docs/lint.md" in capsys.readouterr().out
    assert main(["lint", str(tmp_path / "c.jsonl"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["docs"]
    assert told == {"L101": f"docs/lint.md#{slug('L101 ' + RULES['L101'].summary)}"}


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
