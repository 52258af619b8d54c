"""Prompt and answer in tokens against ``apply_chat_template``, for the templates of published families."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rankalign.data.encode import EncodeOptions, Encoder, encode_all, encode_prompt, fit, said
from rankalign.data.records import CandidateSet, Response
from rankalign.data.render import Answer, Rendering, encode_text
from rankalign.errors import InputError, RecordError
from tests.unit.data.chat_families import ENDS, FAMILIES, KINDS, tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Name a colour."}
SAID = {"role": "assistant", "content": "Blue."}
AGAIN = {"role": "user", "content": "Another, please."}
BYTES = bytes_to_unicode()
EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]


def theirs(tok: Any, messages: list[dict[str, str]]) -> list[int]:
    """The whole conversation by transformers alone."""
    return list(tok.apply_chat_template(messages, tokenize=True, return_dict=False))


def end_of(family: str) -> str:
    return ENDS.get(family, FAMILIES[family][2])


def same(tok: Any, rendering: Rendering, ids: list[int], want: list[int]) -> bool:
    """Equal tokens; where one of them would span the border of prompt and answer, equal texts in other tokens."""
    if not rendering.counts["merged_at_the_border"]:
        return ids == want[: len(ids)]
    return bool(tok.decode(want).startswith(tok.decode(ids)))


# --- the turn and its end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("prompt", [[USER], [USER, SAID, AGAIN]], ids=["one", "three"])
def test_prompt_and_answer_are_what_the_template_makes_of_the_conversation(
    family: str, kind: str, prompt: list[dict[str, str]]
) -> None:
    tok = tokenizer(family, kind)
    rendering = Rendering(tok)
    start, (full, cut) = rendering.answers(prompt, [Answer("Green is one."), Answer("Green is", finished=False)])
    want = theirs(tok, [*prompt, {"role": "assistant", "content": "Green is one."}])
    assert same(tok, rendering, start + full, want)
    assert full[-1] == tok.convert_tokens_to_ids(end_of(family)) == rendering.end_id()
    assert not set(full[:-1]) & set(tok.all_special_ids)
    assert tok.decode(cut).strip().removeprefix("<think>\n\n</think>\n\n") == "Green is"
    read, (text,) = rendering.whole(prompt, [Answer("Green is one.")])
    assert read + text == want


TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "\n\nBlue", " the sky ", "a <think>\nso\n</think>\n\nblue", "</think>", "[INST] x"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["Co", "Cn", "Cc"]), max_size=12),
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    """Any roles in any order, and as often those that every template takes."""
    if draw(st.booleans()):
        roles = draw(st.lists(ROLES, min_size=1, max_size=4))
    else:
        roles = ["system"] * draw(st.integers(0, 1)) + ["user", "assistant"] * draw(st.integers(0, 1)) + ["user"]
    return [{"role": role, "content": draw(TEXTS)} for role in roles]


@settings(max_examples=500, deadline=None)
@given(conversations(), TEXTS, st.sampled_from(EVERY))
def test_any_conversation_is_as_the_template_has_it_or_is_refused(
    prompt: list[dict[str, str]], answer: str, which: tuple[str, str]
) -> None:
    tok = tokenizer(*which)
    rendering = Rendering(tok)
    try:
        start, (ids,) = rendering.answers(prompt, [Answer(answer)])
    except InputError:
        return
    last = prompt[-1]
    whole = (
        [*prompt[:-1], {**last, "content": last["content"] + answer}]
        if last["role"] == "assistant"
        else [*prompt, {"role": "assistant", "content": answer}]
    )
    want = theirs(tok, whole)
    if rendering.counts["special_in_text"]:  # to transformers a spelt control token is one; so it is here, if asked for
        # Without blanks: where a piece of text begins some tokenizers write one, and others a token's own.
        assert "".join(tok.decode(want).split()).startswith("".join(tok.decode(start + ids).split()))
        rendering = Rendering(tok, allow_special=True)
        start, (ids,) = rendering.answers(prompt, [Answer(answer)])
    assert same(tok, rendering, start + ids, want)
    assert rendering.counts["merged_at_the_border"] or ids[-1] not in want[len(start + ids) :]
    if which[1] != "unigram":  # to which some letters are unknown
        assert "".join(answer.split()) in "".join(tok.decode(start + ids).split())
    read, (text,) = rendering.whole(prompt, [Answer(answer)])
    assert read + text == want


def test_thoughts_that_a_template_takes_out_of_an_answer_are_not_lost_in_silence() -> None:
    tok = tokenizer("deepseek-r1")
    with pytest.raises(InputError, match="leaves out a part of this answer"):
        Rendering(tok).answers([USER], [Answer("I think</think>Blue.")])
    start, (ids,) = Rendering(tok).answers([USER], [Answer("Blue.")])
    assert tok.decode(start + ids) == tok.decode(theirs(tok, [USER, SAID]))
    drawn = tuple(encode_text(tok, "so\n</think>\n\nBlue."))
    start, (ids,) = Rendering(tok).answers([USER], [Answer("so\n</think>\n\nBlue.", drawn=drawn)])
    assert tok.decode(start).endswith("<|Assistant|><think>\n")
    assert ids == [*drawn, tok.eos_token_id]
    with pytest.raises(InputError, match="behind the model's generation prompt"):
        Rendering(tok).answers([USER], [Answer("Blue."), Answer("x", drawn=drawn)])


def test_a_drawn_end_is_trained_and_a_missing_one_is_the_templates() -> None:
    tok = tokenizer("gemma")
    encoder = Encoder(tok, EncodeOptions(judge="j"))
    tokens = {"tokenizer": encoder.rendering.fingerprint, "ids": encode_text(tok, "Blue.")}
    turn, eos = tok.convert_tokens_to_ids("<end_of_turn>"), tok.eos_token_id
    for kept, last in (({}, turn), ({"end": eos}, eos), ({"end": turn}, turn)):
        drawn = Response("Blue.", tokens={**tokens, **kept}, scores={"j": 1.0})
        assert encoder.response(drawn) == [*tokens["ids"], last]
    assert encoder.response(Response("Blue.", tokens=tokens, finished=False)) == tokens["ids"]


@pytest.mark.parametrize("family", ["gpt2", "noeos"])
def test_models_without_a_template_end_answers_as_they_end_texts(family: str) -> None:
    tok = tokenizer(family)
    rendering = Rendering(tok)
    start, (ids,) = rendering.answers([SYSTEM, USER], [Answer(" Blue.")])
    assert (tok.decode(start), tok.decode(ids[:6])) == ("Be brief.\n\nName a colour.", " Blue.")
    assert ids[6:] == ([tok.eos_token_id] if family == "gpt2" else [])
    assert rendering.counts["roles_dropped"] == 1
    assert rendering.counts["without_end"] == (family == "noeos")
    assert any("roles vanish" in sentence for sentence in said(rendering.counts))


# --- a begun turn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [e for e in EVERY if e[0] not in ("qwen-3", "deepseek-r1")])
def test_a_begun_answer_is_continued(family: str, kind: str) -> None:
    tok = tokenizer(family, kind)
    prompt = [USER, {"role": "assistant", "content": "My favourite is"}]
    start, (ids,) = Rendering(tok).answers(prompt, [Answer(" blue.")])
    begun = tok.apply_chat_template(prompt, continue_final_message=True, tokenize=True, return_dict=False)
    assert start == encode_prompt(tok, prompt) == list(begun)
    want = theirs(tok, [USER, {"role": "assistant", "content": "My favourite is blue."}])
    assert start + ids == want[: len(start + ids)]
    assert ids[-1] == tok.convert_tokens_to_ids(end_of(family))


@pytest.mark.parametrize(
    ("template", "text"),
    [("hh", "\n\nHuman: Name a colour.\n\nAssistant: My"), ("vicuna", " USER: Name a colour. ASSISTANT: My")],
)
def test_a_begun_answer_is_continued_under_our_templates(template: str, text: str) -> None:
    tok = tokenizer("gpt2")
    prompt = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "My"}]
    assert tok.decode(encode_prompt(tok, prompt, template)) == text


# --- control tokens in texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_control_tokens_that_texts_spell_are_text(family: str, kind: str) -> None:
    tok = tokenizer(family, kind)
    spelt = "".join(FAMILIES[family][0].split()[::-1])
    content = f"a {spelt} forged {spelt}b"
    for role in ("prompt", "answer"):
        prompt = [{"role": "user", "content": content if role == "prompt" else "c"}]
        answer = content if role == "answer" else "c"
        plain_prompt = [{"role": "user", "content": "c"}]
        for method in ("answers", "whole"):
            rendering = Rendering(tok)
            start, (ids,) = getattr(rendering, method)(prompt, [Answer(answer)])
            base, (usual,) = getattr(Rendering(tok), method)(plain_prompt, [Answer("c")])
            control = set(tok.all_special_ids) - {tok.unk_token_id, tok.convert_tokens_to_ids("<unk>")}
            assert [i for i in start + ids if i in control] == [i for i in base + usual if i in control]
            assert content in tok.decode(start + ids) or kind == "unigram"
            assert rendering.counts["special_in_text"] == 1
            kept = getattr(Rendering(tok, allow_special=True), method)(prompt, [Answer(answer)])
            assert sum(i in control for i in kept[0] + kept[1][0]) > sum(i in control for i in base + usual)
    if kind == "bytes":  # the very ids that the tokenizer itself has for the text with its control tokens split
        split = tok(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encode_text(tok, content) == split
        start = encode_prompt(tok, [{"role": "user", "content": content}])
        assert any(start[i : i + len(split)] == split for i in range(len(start)))


def test_a_template_that_reads_a_control_token_in_a_content_refuses_it() -> None:
    tok = tokenizer("chatml")
    template, tok.chat_template = tok.chat_template, "{{ messages[-1]['content'].split('<|im_end|>')[-1] }}"
    try:
        with pytest.raises(InputError, match=r"reads control tokens that a content spells \(<\|im_end\|>\)"):
            encode_prompt(tok, [{"role": "user", "content": "a<|im_end|>b"}])
    finally:
        tok.chat_template = template


# --- what has been rendered --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "rendered"),
    [
        ("What does <|im_start|> mean in ChatML?", False),
        ("Explain [INST] to me.", False),
        ('Is "ASSISTANT:" a good speaker label in a play?', False),
        ("Write below ### Response: your name.", False),
        ("\n\nHuman: Hi\n\nAssistant: Hello", False),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", True),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
        ("<s>[INST] Hi [/INST]", True),
        ("A chat. USER: Hi ASSISTANT:", True),
        ("### Instruction:\nHi\n\n### Response:", True),
    ],
)
def test_only_what_ends_where_an_answer_begins_is_rendered(prompt: str, rendered: bool) -> None:
    tok = tokenizer("qwen-2")
    for template in ("auto", "alpaca"):
        rendering = Rendering(tok, template)
        ids = rendering.prompt(prompt)
        assert (tok.decode(ids) == prompt) == rendered
        assert rendering.counts["already_rendered"] == rendered
    own, (ids,) = Rendering(tok).answers(prompt, [Answer("Hello")])
    assert tok.decode(own + ids).endswith("Hello<|im_end|>")


def test_a_rendered_prompt_ends_its_answer_as_its_own_template_does() -> None:
    tok = tokenizer("gemma")
    own = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert tok.decode(Rendering(tok).answers(own, [Answer("Yes")])[1][0]) == "Yes<end_of_turn>"
    assert tok.decode(Rendering(tok).answers("\n\nHuman: Hi\n\nAssistant:", [Answer("Yes")])[1][0]) == "Yes<eos>"


# --- one cut -----------------------------------------------------------------------------------------------------

LONG = {"role": "user", "content": "Tell me about the sea and the sky. " * 6}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_prompt_keeps_its_start_its_system_turn_and_its_headers(family: str) -> None:
    tok = tokenizer(family)
    system = [] if family in ("gemma", "mistral") else [SYSTEM]
    rendering, short = Rendering(tok), [*system, {"role": "user", "content": "+"}]
    whole, frame = encode_prompt(tok, [*system, LONG]), encode_prompt(tok, short)
    room = len(frame) + 40
    cut = rendering.shortened(whole, room, [*system, LONG])
    assert len(cut) == room
    before, behind = tok.decode(frame).split("+")
    text = tok.decode(cut)
    assert text.startswith(before)
    assert text.endswith(behind)
    assert text.removeprefix(before).removesuffix(behind).strip() in LONG["content"]
    turns = [*system, LONG, SAID, AGAIN]
    assert rendering.shortened(encode_prompt(tok, turns), 200, turns) == encode_prompt(tok, [*system, AGAIN])
    assert len(rendering.shortened(whole, 3, [*system, LONG])) == 3


def test_the_cut_of_a_list_spares_the_answers_and_then_takes_their_ends() -> None:
    shorten = lambda ids, room: ids[-room:]  # noqa: E731
    assert fit([1] * 10, [[2] * 3], 20, shorten) == ([1] * 10, [[2] * 3])
    assert fit([1] * 10, [[2] * 3, [2] * 6], 12, shorten) == ([1] * 6, [[2] * 3, [2] * 6])
    assert fit([1] * 10, [[2] * 9], 12, shorten) == ([1] * 6, [[2] * 6])


# --- records -----------------------------------------------------------------------------------------------------


def scored(ident: str, prompt: Any, *texts: str) -> CandidateSet:
    responses = [Response(text, scores={"j": float(i)}) for i, text in enumerate(texts)]
    return CandidateSet(ident, prompt, responses, origin=("in.jsonl", int(ident)))


def test_a_record_that_the_template_refuses_is_named_and_can_be_left_out() -> None:
    sets = [scored("1", [USER], "a", "b"), scored("2", [SYSTEM, USER], "a", "b"), scored("3", [USER, USER], "a", "b")]
    with pytest.raises(RecordError, match=r"in\.jsonl:2: prompt: record '2'.*System role not supported"):
        encode_all(sets, tokenizer("gemma"), EncodeOptions(judge="j"))
    errors: list[RecordError] = []
    lists, _ = encode_all(sets, tokenizer("gemma"), EncodeOptions(judge="j"), errors.append)
    assert [tokens.id for tokens in lists] == ["1"]
    assert [error.line for error in errors] == [2, 3]


def test_empty_answers_are_left_out_and_counted() -> None:
    sets = [scored("1", [USER], "", "a", " \n"), scored("2", [USER], "")]
    lists, counts = encode_all(sets, tokenizer("qwen-2"), EncodeOptions(judge="j"))
    assert [len(tokens.responses) for tokens in lists] == [1]
    assert (counts["empty"], counts["dropped_prompts"]) == (3, 1)


def test_messages_that_a_template_leaves_out_are_counted() -> None:
    rendering = Rendering(tokenizer("vicuna"))
    rendering.prompt([{"role": "user", "content": "a"}, {"role": "system", "content": "hidden"}, USER])
    assert rendering.counts["contents_not_shown"] == 0  # written as an answer, but shown
    rendering = Rendering(tokenizer("deepseek-r1"))
    rendering.prompt([USER, {"role": "tool", "content": "hidden"}, AGAIN])
    assert rendering.counts["contents_not_shown"] == 1


# The rows of the training cases, and the tokens that they are: a byte is a token of families without merges.
CASES = [
    ([{"role": "user", "content": "What does <|im_start|> mean in ChatML?"}], "It opens a turn."),
    ([{"role": "user", "content": "Explain [INST] to me."}], "A mark before a question."),
    ([{"role": "user", "content": 'Is "ASSISTANT:" a good speaker label in a play?'}], "It is clear."),
    ([USER, {"role": "assistant", "content": "My favourite fruit is"}], " the plum."),
    ([USER, SAID, AGAIN], "A plum."),
    ([SYSTEM, USER, SAID, AGAIN], "Tar."),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "answer"), CASES, ids=["marks", "inst", "label", "begun", "turns", "system"])
def test_contents_are_their_bytes_and_all_else_is_the_templates(
    family: str, prompt: list[dict[str, str]], answer: str
) -> None:
    """Contents are put into the rendered text as bytes, between pieces that the tokenizer makes of the template's own
    words: a mark that a content spells is never a control token, and nothing of a role or a turn is lost."""
    tok = tokenizer(family, "bytes")
    whole = [*prompt, {"role": "assistant", "content": answer}]
    if prompt[-1]["role"] == "assistant":
        whole = [*prompt[:-1], {"role": "assistant", "content": prompt[-1]["content"] + answer}]
    marked = [{**message, "content": f"@{i}@"} for i, message in enumerate(whole)]
    try:
        start, (ids,) = Rendering(tok).answers(prompt, [Answer(answer)])
        rendered = tok.apply_chat_template(marked, tokenize=False)
    except (InputError, TemplateError):
        assert [m["role"] for m in prompt] != ["user"]
        return
    want: list[int] = []
    for piece in re.split("(@[0-9]@)", rendered):
        content = whole[int(piece[1])]["content"] if re.fullmatch("@[0-9]@", piece) else ""
        told = [tok.convert_tokens_to_ids(BYTES[byte]) for byte in content.encode()]
        want += told or tok(piece, add_special_tokens=False)["input_ids"]
    assert start + ids == want[: len(start + ids)]
    assert ids[-1] == tok.convert_tokens_to_ids(end_of(family))
