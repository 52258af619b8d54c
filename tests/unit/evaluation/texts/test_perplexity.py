"""Perplexity against closed forms and against the model's own logits, text by text."""

from __future__ import annotations

import math

import pytest
import torch

from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.evaluation.raters.accuracy import add_policy_scores
from rankalign.evaluation.texts import perplexity as ppl
from rankalign.models import tiny

TEXTS = ["Hello there.", "a", "The sea is wide and the sky is high, ünïcode too."]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.build_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture(scope="module")
def uniform() -> torch.nn.Module:
    flat = tiny.build_model()
    torch.nn.init.zeros_(flat.get_output_embeddings().weight)
    return flat


def direct(model: torch.nn.Module, read: list[int], ids: list[int]) -> list[float]:
    """Nats of ``ids`` behind ``read``: one forward pass a token, nothing shared with the package."""
    nats = []
    for i, token in enumerate(ids):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([read + ids[:i]])).logits[0, -1].double()
        nats.append(float(torch.logsumexp(logits, 0) - logits[token]))
    return nats


def test_uniform_logits_give_the_size_of_the_vocabulary(uniform, tokenizer) -> None:
    metrics = ppl.evaluate_perplexity(uniform, tokenizer, TEXTS).metrics
    size = uniform.config.vocab_size
    for name in ("perplexity", "mean_perplexity", "median_perplexity"):
        assert metrics[name] == pytest.approx(size, rel=1e-6)
    # One token a byte, so every byte costs log2(V) bits.
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(size), rel=1e-6)
    assert metrics["tokens"] == sum(len(text.encode()) for text in TEXTS)


def test_texts_alone_equal_one_pass_a_token(model, tokenizer) -> None:
    nats = [direct(model, [tokenizer.bos_token_id], list(ids)) for ids in map(tokens_of(tokenizer), TEXTS)]
    result = ppl.evaluate_perplexity(model, tokenizer, [*TEXTS, ""])
    own = [math.exp(sum(n) / len(n)) for n in nats]
    total, count = sum(map(sum, nats)), sum(map(len, nats))
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.metrics["mean_perplexity"] == pytest.approx(sum(own) / 3, rel=1e-5)
    assert result.metrics["median_perplexity"] == pytest.approx(sorted(own)[1], rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert result.metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert (result.n, result.metrics["empty"]) == (3, 1)
    low, high = result.ci95["perplexity"]
    assert low <= result.metrics["perplexity"] <= high


def tokens_of(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_responses_are_read_behind_their_prompt(model, tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    record = CandidateSet("a", messages, [Response("Yes.", "m", count=2), Response("No", "m")])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    nats = [direct(model, list(prompt), tokens_of(tokenizer)(text)) for text in ("Yes.", "No")]
    total, count = 2 * sum(nats[0]) + sum(nats[1]), 2 * len(nats[0]) + len(nats[1])
    found = ppl.evaluate_perplexity(model, tokenizer, [record])
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (found.n, found.metrics["texts"]) == (1, 3)
    alone = ppl.evaluate_perplexity(model, tokenizer, [record], given_prompt=False)
    texts = ppl.evaluate_perplexity(model, tokenizer, ["Yes.", "Yes.", "No"])
    assert alone.metrics["perplexity"] == pytest.approx(texts.metrics["perplexity"], rel=1e-6)
    assert alone.metrics["perplexity"] != pytest.approx(found.metrics["perplexity"], rel=1e-3)


def test_a_prompt_that_does_not_fit_keeps_its_start_and_its_header(model, tokenizer) -> None:
    record = CandidateSet("a", "the sea and the sky " * 40, [Response("Yes, and no. " * 4, "m")])
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": record.prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    limit = model.config.max_position_embeddings
    assert len(whole) > limit
    head = len(tokenizer("<|bos|><|user|>\n", add_special_tokens=False)["input_ids"])
    read = list(whole[:head]) + list(whole[len(whole) - (limit // 2 - head) :])
    ids = tokens_of(tokenizer)(record.responses[0].text)
    found = ppl.evaluate_perplexity(model, tokenizer, [record])
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(direct(model, read, ids)) / len(ids)), rel=1e-5)


def test_batching_and_order_change_nothing(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text * k for k, text in enumerate(TEXTS * 3, start=1)]
    whole = {row["id"]: row["nats"] for row in ppl.evaluate_perplexity(model, tokenizer, texts).rows}
    monkeypatch.setattr(ppl, "TOKENS_A_PASS", 1)
    single = ppl.evaluate_perplexity(model, tokenizer, texts).rows
    assert [row["nats"] for row in single] == pytest.approx([whole[row["id"]] for row in single], rel=1e-6)


def test_a_prompt_is_read_once_for_its_answers(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one prompt make one list, a text drawn twice one answer of it; each has the nats that it has alone."""
    from rankalign.rows import logps

    answers = [Response(text, "m", count=1 + (text == "Yes.")) for text in ("Yes.", "Yes, and no.", "No")]
    records = [CandidateSet(name, f"Is {name} so?", answers) for name in "ab"]
    asked, whole = [], logps.token_logps

    def watched(model, prompts, responses):
        asked.append([len(own) for own in responses])
        return whole(model, prompts, responses)

    monkeypatch.setattr(logps, "token_logps", watched)
    rows = ppl.evaluate_perplexity(model, tokenizer, records).rows
    assert asked == [[3, 3]]
    assert [row["id"] for row in rows] == ["a"] * 4 + ["b"] * 4
    for record, own in zip(records, (rows[:4], rows[4:]), strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": record.prompt}], add_generation_prompt=True, return_dict=False
        )
        texts = [r.text for r in answers for _ in range(r.count)]
        alone = [sum(direct(model, list(prompt), tokens_of(tokenizer)(text))) for text in texts]
        assert [row["nats"] for row in own] == pytest.approx(alone, rel=1e-6)
    monkeypatch.setattr(ppl, "TOKENS_A_PASS", 2 * max(len(prompt) + len(tokens_of(tokenizer)(t)) for t in texts))
    asked.clear()
    cut = ppl.evaluate_perplexity(model, tokenizer, records).rows
    assert asked == [[2], [1, 1], [2]]
    assert [row["nats"] for row in cut] == pytest.approx([row["nats"] for row in rows], rel=1e-6)


def test_rrhf_arithmetic(model, tokenizer, uniform) -> None:
    texts = ["A line\nand another, long enough to be cut", "", "short"]
    powers = []
    for text in ("A line and another,", " ", "short"):  # 19 bytes, which are 19 tokens here; one blank; as it is
        nats = direct(model, [tokenizer.bos_token_id], tokens_of(tokenizer)(text))
        powers.append(2 ** (sum(nats) / len(nats)))
    result = ppl.evaluate_perplexity(model, tokenizer, texts, compat="rrhf")
    assert result.metrics["mean_perplexity"] == pytest.approx(sum(powers) / 3, rel=1e-5)
    flat = ppl.evaluate_perplexity(uniform, tokenizer, texts, compat="rrhf").metrics["mean_perplexity"]
    assert flat == pytest.approx(2 ** math.log(uniform.config.vocab_size), rel=1e-6)
    with pytest.raises(InputError, match="unknown compat 'hf'"):
        ppl.evaluate_perplexity(model, tokenizer, texts, compat="hf")


def test_long_texts_are_scored_in_windows_each_token_once(model, tokenizer) -> None:
    text = "0123456789" * 60  # 600 tokens, context 512
    row = ppl.evaluate_perplexity(model, tokenizer, [text]).rows[0]
    ids = tokens_of(tokenizer)(text)
    first = direct_pass(model, [tokenizer.bos_token_id], ids[:511])
    second = direct_pass(model, ids[511 - 256 : 511], ids[511:])
    assert row["tokens"] == 600
    assert row["nats"] == pytest.approx(first + second, rel=1e-5)


def direct_pass(model: torch.nn.Module, read: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([read + ids])).logits[0, len(read) - 1 : -1].double()
    return float(-logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize(("read", "length", "limit"), [(1, 10, 4), (3, 2, 8), (20, 5, 8), (2, 6, 8), (20, 30, 9)])
def test_windows_predict_each_token_once_within_the_limit(read: int, length: int, limit: int) -> None:
    before, ids = list(range(100, 100 + read)), list(range(length))
    pieces = ppl.windows(before, ids, limit)
    assert [token for _, piece in pieces for token in piece] == ids
    for context, piece in pieces:
        assert 1 <= len(context) <= limit
        assert len(context) + len(piece) <= limit
        line = before + ids
        at = line.index(piece[0])
        assert line[at - len(context) : at] == context
    assert all(len(context) == limit // 2 for context, _ in pieces[1:])
    if read + length <= limit:
        assert pieces == [(before, ids)]


def test_nothing_to_measure(model, tokenizer) -> None:
    for data, compat in (([], ""), ([""], ""), ([], "rrhf")):
        with pytest.raises(InputError, match="no text"):
            ppl.evaluate_perplexity(model, tokenizer, data, compat=compat)


def test_start_token_falls_back_to_the_end_token() -> None:
    class Plain:
        bos_token_id, eos_token_id = None, 7

    assert ppl.start_token(Plain()) == 7
    Plain.eos_token_id = None
    with pytest.raises(InputError, match="beginning- or end-of-sequence"):
        ppl.start_token(Plain())


def test_policy_scores_are_mean_log_probabilities(model, tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
    answers = [Response("Yes.", "m"), Response("No", "m", finished=False), Response("", "m", finished=False)]
    record = CandidateSet("a", messages, answers)
    add_policy_scores(model, tokenizer, [record])
    yes, no = tokens_of(tokenizer)("Yes."), tokens_of(tokenizer)("No")
    wanted = [-sum(direct(model, prompt, ids)) / len(ids) for ids in ([*yes, tokenizer.eos_token_id], no)]
    assert record.scores("policy")[:2] == pytest.approx(wanted, rel=1e-5)
    assert record.scores("policy")[2] is None
