"""Records to tokens: one BOS, EOS on finished answers only, sampled tokens kept, truncation that spares the answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rankalign.data import special
from rankalign.data.encode import EncodeOptions, Encoder, encode_prompt, encode_text, spread
from rankalign.data.records import CandidateSet, Response, choose_judge
from rankalign.errors import InputError
from rankalign.models import tiny
from rankalign.models.load import tokenizer_fingerprint

TOKENIZER = tiny.build_tokenizer()
EOS, BOS = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id
USER = [{"role": "user", "content": "Hi"}]


def record(*responses: Response, prompt: object = "Why?") -> CandidateSet:
    return CandidateSet("p", prompt, list(responses))  # type: ignore[arg-type]


def scored(text: str, score: float | None = 1.0, **more: object) -> Response:
    return Response(text, scores={"j": score}, **more)  # type: ignore[arg-type]


def encoder(**options: object) -> Encoder:
    return Encoder(TOKENIZER, EncodeOptions(judge="j", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["auto", "chat", "raw", "hh", "alpaca", "vicuna"])
@pytest.mark.parametrize("prompt", ["Hi", USER])
def test_one_bos_at_the_start(template: str, prompt: object) -> None:
    ids = encode_prompt(TOKENIZER, prompt, template)  # type: ignore[arg-type]
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert ids[-1] != EOS


def test_auto_is_chat_for_messages_and_plain_strings_but_not_for_rendered_ones() -> None:
    chat = encode_prompt(TOKENIZER, USER, "chat")
    assert encode_prompt(TOKENIZER, USER) == encode_prompt(TOKENIZER, "Hi") == chat
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, dialogue)[1:]) == dialogue


def test_chat_needs_a_chat_template() -> None:
    bare = tiny.build_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match="needs a tokenizer with a chat template"):
        encode_prompt(bare, USER, "chat")
    assert bare.decode(encode_prompt(bare, USER, "auto")[1:]) == "Hi"


def test_a_tokenizer_that_closes_with_eos_does_not_end_the_prompt() -> None:
    from tokenizers import processors

    closing = tiny.build_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", BOS), ("<|eos|>", EOS)]
    )
    ids = encode_prompt(closing, "Hi", "raw")
    assert (ids[0], ids[-1] != EOS) == (BOS, True)


def test_eos_only_where_finished() -> None:
    encode = encoder()
    assert encode.response(Response("ab")) == [*encode_text(TOKENIZER, "ab"), EOS]
    assert encode.response(Response("ab", finished=False)) == encode_text(TOKENIZER, "ab")
    assert encode.response(Response("")) == [EOS]


def test_sampled_tokens_are_kept_for_the_same_tokenizer_alone() -> None:
    odd = [*encode_text(TOKENIZER, "a"), *encode_text(TOKENIZER, "b")]
    tokens = {"tokenizer": tokenizer_fingerprint(TOKENIZER), "ids": odd}
    encode = encoder()
    assert encode.response(Response("xx", tokens=tokens)) == [*odd, EOS]
    foreign = Response("xx", tokens={**tokens, "tokenizer": "0" * 16})
    assert encode.response(foreign) == [*encode_text(TOKENIZER, "xx"), EOS]


def test_stop_response_cuts_and_finishes() -> None:
    cut = encoder(stop_response=True).response(Response(" yes\n\nHuman: more", finished=False))
    assert cut == [*encode_text(TOKENIZER, "yes"), EOS]


def test_no_blank_is_invented_by_sentencepiece_style_tokenizers() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "\n", *list("▁abcdefgh")]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    blank = words.index("▁")
    assert tokenizer("ab", add_special_tokens=False)["input_ids"][0] == blank
    assert encode_text(tokenizer, "ab") == [words.index("a"), words.index("b")]
    assert encode_text(tokenizer, " ab")[0] == blank


def test_counts_tell_what_was_left_out() -> None:
    encode = encoder()
    lists = encode.encode(
        record(scored("a", 1.0), scored("b", None), scored("c", 2.0), scored("", 3.0, finished=False))
    )
    assert lists is not None
    assert lists.scores == [1.0, 2.0]
    assert encode.encode(record(scored("", 1.0, finished=False))) is None
    counts = encode.counts
    assert (counts["unscored"], counts["empty"], counts["dropped_prompts"]) == (1, 2, 1)
    assert (counts["prompts"], counts["candidates"], counts["pairs"], counts["tied_pairs"]) == (1, 2, 1, 0)


def test_ties_are_counted() -> None:
    encode = encoder()
    encode.encode(record(*(scored("a", s) for s in (1.0, 1.0, 0.0, 1.0))))
    assert (encode.counts["pairs"], encode.counts["tied_pairs"]) == (3, 3)


def test_which_responses_are_used() -> None:
    four = record(*(scored(text, s) for text, s in zip("abcd", (4.0, 3.0, 2.0, 1.0), strict=True)))
    texts = {name: encoder(**{name: True}).encode(four) for name in ("only_use_provide", "only_use_sample")}
    assert texts["only_use_provide"].scores == [2.0, 1.0]  # type: ignore[union-attr]
    assert texts["only_use_sample"].scores == [4.0, 3.0]  # type: ignore[union-attr]


def test_spread_keeps_best_and_worst() -> None:
    pool = [(Response(str(s)), float(s)) for s in (3, 9, 1, 7, 5)]
    assert [s for _, s in spread(pool, 3)] == [9.0, 1.0, 5.0]
    assert [s for _, s in spread(pool, 1)] == [9.0]
    assert spread(pool, 0) == spread(pool, 5) == pool


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=80),
    st.lists(st.tuples(st.text(max_size=90), st.booleans()), min_size=1, max_size=5),
    st.integers(min_value=2, max_value=60),
)
def test_never_longer_than_the_limit_and_every_answer_keeps_tokens(
    prompt: str, answers: list[tuple[str, bool]], limit: int
) -> None:
    encode = encoder(max_length=limit, template="raw")
    responses = [scored(text.encode("utf-8", "ignore").decode(), 1.0, finished=done) for text, done in answers]
    prompt = prompt.encode("utf-8", "ignore").decode()
    found = encode.encode(record(*responses, prompt=prompt or "x"))
    whole = [encode.response(response) for response in responses if response.text.strip()]
    if found is None:
        assert not whole
        return
    assert found.prompt
    assert len(found.responses) == len(whole)
    for cut, full in zip(found.responses, whole, strict=True):
        assert len(found.prompt) + len(cut) <= limit
        assert cut == full[: len(cut)]
        assert len(cut) == len(full) or len(cut) >= limit // 2
    assert encode.counts["response_truncated"] == sum(
        len(cut) < len(full) for cut, full in zip(found.responses, whole, strict=True)
    )


def test_the_prompt_gives_way_from_its_left() -> None:
    encode = encoder(max_length=10, template="raw")
    found = encode.encode(record(scored("abcdefg", 1.0), prompt="0123456789"))
    assert found is not None
    assert TOKENIZER.decode(found.prompt) == "<|bos|>6789"
    assert TOKENIZER.decode(found.responses[0]) == "abcde"
    assert (encode.counts["prompt_truncated"], encode.counts["response_truncated"]) == (1, 1)


@pytest.mark.parametrize(
    ("sets", "judge", "message"),
    [
        ([], "", "no response has a score"),
        ([record(Response("a", scores={"x": 1.0, "y": 2.0}))], "", "several judges scored: x, y; name one"),
        ([record(Response("a", scores={"x": 1.0}))], "z", "no response has a score by judge 'z'.*: x"),
    ],
)
def test_the_judge_is_never_guessed(sets: list[CandidateSet], judge: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_judge(sets, judge)


def test_a_tokenizer_in_python_puts_its_special_tokens_around_a_text_that_spells_one() -> None:
    """ByT5: a byte is its value + 3, and </s> (id 1) ends what is encoded with special tokens."""
    tokenizer = ByT5Tokenizer()
    assert special.controls(tokenizer).pattern is not None
    broken = special.controls(tokenizer).broken("a</s>b")
    told = [byte + 3 for byte in b"a</s>b"]
    assert special.encode(tokenizer, broken) == told
    assert special.encode(tokenizer, broken, add_special_tokens=True) == [*told, 1]
    assert special.encode(tokenizer, "ab", add_special_tokens=True) == [ord("a") + 3, ord("b") + 3, 1]
