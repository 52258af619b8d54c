"""Engine ``hf``: the decode loop against transformers, answers against their seeds, and where they end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

from rankalign.data import encode as batching
from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy, SamplingParams, uncached
from rankalign.engines.decode import Ending, Rows
from rankalign.engines.hf import MAX_ROWS, MAX_TOKENS, HFEngine
from rankalign.errors import InputError
from rankalign.models import tiny
from rankalign.models.load import tokenizer_fingerprint

TEXT = "the quick brown fox jumps over the lazy dog again and again until it is tired"
PROMPTS = [CandidateSet(f"p{i}", TEXT[: 3 + 10 * i]) for i in range(8)]


def build(double: bool = False, ends: Sequence[int] = (2,)) -> Any:
    """The tiny model; more tokens that end an answer make answers of mixed length."""
    model: Any = tiny.build_model()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=list(ends))
    return model.double() if double else model


def engine(model: Any = None, name: str = "tiny-a", template: str = "auto", **settings: Any) -> HFEngine:
    made = HFEngine(Policy(name, model="tiny", template=template, sampling=SamplingParams(**settings)))
    made.model, made.tokenizer = model or build(), tiny.build_tokenizer()
    return made


def reference(model: Any, prompts: Sequence[CandidateSet], **settings: Any) -> list[list[list[int]]]:
    """What ``generate`` of transformers writes, one prompt at a time: new tokens up to the end of sequence."""
    tokenizer, found = tiny.build_tokenizer(), []
    ends = model.generation_config.eos_token_id
    for prompt in prompts:
        ids = torch.tensor([batching.encode_prompt(tokenizer, prompt.prompt)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        new = output[:, ids.shape[1] :].tolist()
        found.append([next((row[:i] for i, token in enumerate(row) if token in ends), row) for row in new])
    return found


def ids_of(answers: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[response.tokens["ids"] for response in row if response.tokens is not None] for row in answers]


# --- the decode loop ----------------------------------------------------------------------------------------------

MANY_ENDS = (2, *range(60, 90))


@pytest.mark.parametrize("ends", [(2,), MANY_ENDS], ids=["one-end", "many-ends"])
def test_greedy_equals_transformers(ends: tuple[int, ...]) -> None:
    model = build(double=True, ends=ends)
    answers = engine(model, temperature=0, max_new_tokens=20).generate(PROMPTS)
    assert ids_of(answers) == reference(model, PROMPTS, max_new_tokens=20)


@pytest.mark.parametrize("ends", [(2,), MANY_ENDS], ids=["one-end", "many-ends"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 3.0])
def test_beams_equal_transformers(ends: tuple[int, ...], length_penalty: float) -> None:
    model = build(double=True, ends=ends)
    settings: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 10, "length_penalty": length_penalty}
    answers = engine(model, n=3, **settings).generate(PROMPTS[:4])
    assert ids_of(answers) == reference(model, PROMPTS[:4], num_return_sequences=3, **settings)


def test_diverse_beams_differ_and_start_with_the_greedy_answer() -> None:
    settings: dict[str, Any] = {"n": 4, "num_beams": 4, "max_new_tokens": 8}
    model = build(double=True)
    diverse = ids_of(engine(model, num_beam_groups=4, diversity_penalty=5.0, **settings).generate(PROMPTS))
    greedy = ids_of(engine(model, temperature=0, max_new_tokens=8).generate(PROMPTS))
    assert [row[0] for row in diverse] == [row[0] for row in greedy]
    assert all(len({ids[0] for ids in row}) == 4 for row in diverse)
    alike = ids_of(engine(model, num_beam_groups=4, **settings).generate(PROMPTS))
    assert alike == [row * 4 for row in greedy]


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 262}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 262, "n_positions": 64},
    "OPT": SMALL | {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 262},
    "GPTNeoX": SMALL | {"intermediate_size": 64, "max_position_embeddings": 64},
    "Mistral": SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 7},
    "Bamba": SMALL
    | {"intermediate_size": 64, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 4}
    | {"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_other_architectures_decode_as_transformers_does(family: str, beams: int) -> None:
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **ends)
    dtype = torch.float32 if family == "Bloom" else torch.float64  # its alibi turns padding into NaN in float64
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # the customary start makes all logits alike
        for weight in model.parameters():
            weight.mul_(4.0)
    model.generation_config = GenerationConfig(**{**ends, "eos_token_id": [2]})
    prompts = [CandidateSet(p.id, str(p.prompt)[:24]) for p in PROMPTS[:4]]
    settings: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12}
    answers = engine(model, template="raw", temperature=0, **settings).generate(prompts)
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = None
    expected = []
    for prompt in prompts:
        ids = torch.tensor([batching.encode_prompt(tokenizer, prompt.prompt)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        expected.append([[token for token in output[0, ids.shape[1] :].tolist() if token != 2]])
    assert ids_of(answers) == expected


def test_a_model_without_a_cache_runs_every_text_again(capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.RwkvConfig(vocab_size=262, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    answers = ids_of(engine(model, temperature=0, max_new_tokens=6).generate(PROMPTS[:3]))
    expected = []
    for prompt in PROMPTS[:3]:
        ids = batching.encode_prompt(tiny.build_tokenizer(), prompt.prompt)
        start = len(ids)
        while len(ids) < start + 6 and (len(ids) == start or ids[-1] != 2):
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        expected.append([[token for token in ids[start:] if token != 2]])
    assert answers == expected
    assert capsys.readouterr().err.count("RwkvForCausalLM cannot decode several texts") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_an_error_and_not_a_token(temperature: float) -> None:
    model = build()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(InputError, match="logits are not finite"):
        engine(model, temperature=temperature, max_new_tokens=2).generate(PROMPTS[:1])


def test_an_adapter_is_heard() -> None:
    from peft import LoraConfig, get_peft_model

    plain, adapted = build(double=True), build(double=True)
    adapted = get_peft_model(adapted, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = adapted.double().eval()
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8}
    answers = ids_of(engine(adapted, **settings).generate(PROMPTS[:3]))
    assert answers == reference(adapted, PROMPTS[:3], max_new_tokens=8)
    assert answers != ids_of(engine(plain, **settings).generate(PROMPTS[:3]))


def test_cache_layers_hold_what_the_librarys_hold() -> None:
    model = build(double=True)
    prompt = [1, 50, 60, 70]
    rows = Rows(model, [prompt, prompt[:2]])
    rows.select([1, 0, 1])
    expected = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in (prompt[:2], prompt, prompt[:2])])
    torch.testing.assert_close(rows.logits, expected, rtol=0, atol=1e-12)
    steps = torch.randint(3, 262, (80, 3), generator=torch.Generator().manual_seed(1))  # past the spare room
    for step in steps:
        rows.append(step)
    rows.select([2, 1])
    rows.append(torch.tensor([9, 9]))
    texts = [[*prompt[:2], *steps[:, 2].tolist(), 9], [*prompt, *steps[:, 1].tolist(), 9]]
    expected = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
    torch.testing.assert_close(rows.logits, expected, rtol=0, atol=1e-12)


class Counter:
    """Counts the tokens that go through a model, by forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("search", [{"n": 4}, {"n": 4, "num_beams": 4}, {"n": 4, "num_beams": 4, "num_beam_groups": 2}])
def test_a_prompt_is_computed_once_for_all_answers(search: dict[str, Any]) -> None:
    model = build()
    counter = Counter(model)
    made = engine(model, max_new_tokens=5, **search)
    made.generate(PROMPTS[2:5])
    longest = max(len(batching.encode_prompt(made.tokenizer, prompt.prompt)) for prompt in PROMPTS[2:5])
    assert counter.shapes == [(3, longest)] + [(12, 1)] * 4


def test_finished_rows_leave_the_batch() -> None:
    model = build(ends=MANY_ENDS)
    counter = Counter(model)
    answers = engine(model, n=4, max_new_tokens=30).generate(PROMPTS)
    lengths = [len(r.tokens["ids"]) + r.finished for row in answers for r in row if r.tokens]
    assert sum(rows for rows, _ in counter.shapes[1:]) == sum(length - 1 for length in lengths)
    assert len(set(lengths)) > 5


def test_equal_greedy_answers_are_written_once() -> None:
    model = build()
    counter = Counter(model)
    (answers,) = engine(model, n=3, temperature=0, max_new_tokens=4).generate(PROMPTS[:1])
    assert len({tuple(r.tokens["ids"]) for r in answers if r.tokens}) == 1
    assert [r.sampling["index"] for r in answers] == [0, 1, 2]
    assert counter.shapes[1:] == [(1, 1)] * 3


# --- seeds --------------------------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_its_batch() -> None:
    model = build(double=True, ends=MANY_ENDS)
    made = engine(model, n=3, max_new_tokens=16, temperature=0.9, top_p=0.95)
    together = made.generate(PROMPTS)
    alone = [made.generate([prompt])[0] for prompt in PROMPTS]
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    permuted = made.generate([PROMPTS[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == permuted
    assert len({r.text for row in together for r in row}) > 16


def test_every_part_of_the_seed_counts() -> None:
    model = build(double=True)
    base = ids_of(engine(model, n=2, max_new_tokens=8).generate(PROMPTS[:1]))[0]
    assert base[0] != base[1]
    assert ids_of(engine(model, n=1, max_new_tokens=8).generate(PROMPTS[:1]))[0] == base[:1]
    assert ids_of(engine(model, n=2, max_new_tokens=8, seed=1).generate(PROMPTS[:1]))[0] != base
    assert ids_of(engine(model, name="other", n=2, max_new_tokens=8).generate(PROMPTS[:1]))[0] != base
    renamed = dataclasses.replace(PROMPTS[0], id="else")
    assert ids_of(engine(model, n=2, max_new_tokens=8).generate([renamed]))[0] != base


def test_padding_side_of_the_tokenizer_is_irrelevant() -> None:
    made = engine(build(double=True), max_new_tokens=8)
    found = []
    for side in ("left", "right"):
        made.tokenizer.padding_side = side
        found.append(made.generate(PROMPTS))
    assert found[0] == found[1]


def test_sampled_tokens_follow_the_models_distribution() -> None:
    """First tokens of 4000 answers against the softmax of the model's own logits, in ten bins of equal mass."""
    from scipy import stats

    model = build(double=True)
    prompts = [dataclasses.replace(PROMPTS[0], id=str(i)) for i in range(8)]
    answers = engine(model, n=500, max_new_tokens=1, temperature=0.7, template="raw").generate(prompts)
    drawn = torch.tensor([r.tokens["ids"][0] if r.tokens and r.tokens["ids"] else 2 for row in answers for r in row])
    ids = torch.tensor([batching.encode_prompt(tiny.build_tokenizer(), PROMPTS[0].prompt, "raw")])
    probs = torch.softmax(model(ids).logits[0, -1] / 0.7, dim=-1).detach()
    bins = (probs.cumsum(0) * 10).clamp(max=9.999).long()
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, probs) * len(drawn)
    counts = torch.bincount(bins[drawn], minlength=10)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 0.01


# --- ends ---------------------------------------------------------------------------------------------------------


def test_nothing_stands_behind_the_end_of_sequence() -> None:
    for search in ({"n": 3}, {"n": 3, "num_beams": 3}):
        answers = engine(build(ends=MANY_ENDS), max_new_tokens=30, **search).generate(PROMPTS)
        everything = [r for row in answers for r in row]
        assert all(r.tokens and not set(r.tokens["ids"]) & set(MANY_ENDS) for r in everything)
        assert all(r.finished == (len(r.tokens["ids"]) < 30) for r in everything if r.tokens)
        assert any(r.finished for r in everything)


def test_the_token_limit_leaves_an_answer_unfinished() -> None:
    answers = engine(max_new_tokens=3, n=2).generate(PROMPTS)
    assert all(not r.finished and r.tokens and len(r.tokens["ids"]) == 3 for row in answers for r in row)
    assert answers[0][1].sampling == {"temperature": 1.0, "seed": 0, "max_new_tokens": 3, "index": 1}
    beams = engine(max_new_tokens=3, num_beams=2).generate(PROMPTS[:1])[0][0]
    assert not beams.finished
    assert beams.sampling == {"num_beams": 2, "max_new_tokens": 3, "index": 0}


class Scripted(torch.nn.Module):
    """A model that continues every prompt with one text, byte by byte, and then with nothing but ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.config = tiny.build_model().config
        self.generation_config = GenerationConfig(eos_token_id=2)
        self.device = torch.device("cpu")
        self.script = [*tiny.build_tokenizer()(text, add_special_tokens=False)["input_ids"], 2]
        self.steps = 0
        setattr(self, uncached._BATCHES, True)  # a trial would take steps of the script

    def forward(self, input_ids: Any, attention_mask: Any, past_key_values: DynamicCache, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 262)
        logits[:, -1, self.script[min(self.steps, len(self.script) - 1)]] = 50.0
        self.steps += 1
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nhuman:")
STOP_TABLE = [
    ("a plain answer", "a plain answer", True),
    ("blanks around stay \n", "blanks around stay \n", True),
    ("first\n\nHuman: and\n\nAssistant: more", "first", True),
    ("first\n\nAssistant: and\n\nHuman: more", "first", True),
    ("shorter mark later \n \n\nhuman:", "shorter mark later", True),
    ("  leading goes, and so do tokens\n\nHuman:", "leading goes, and so do tokens", False),
    ("\n\nHuman: at once", "", True),
    ("no stop: \nHuman:", "no stop: \nHuman:", True),
    ("ünï\n\nHuman:", "ünï", True),
]


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}], ids=["sample", "beams"])
@pytest.mark.parametrize(("written", "text", "has_tokens"), STOP_TABLE)
def test_stop_strings(written: str, text: str, has_tokens: bool, search: dict[str, Any]) -> None:
    model: Any = Scripted(written)
    made = engine(model, template="hh", max_new_tokens=80, temperature=0, **search)
    ((answer,),) = made.generate(PROMPTS[:1])
    assert (answer.text, answer.finished) == (text, True)
    assert (answer.tokens is not None) == has_tokens
    if answer.tokens:
        assert made.tokenizer.decode(answer.tokens["ids"]) == text
    stops = [written.find(mark) + len(mark) for mark in STOPS if mark in written]
    if stops and not search:
        assert model.steps == len(written.encode()[: len(written[: min(stops)].encode())])


def test_stop_strings_of_policy_and_template_add_up() -> None:
    made = HFEngine(Policy("x", template="hh", sampling=SamplingParams(stop=("END", "\n\nHuman:"))))
    assert made._stop == ("END", "\n\nHuman:", "\n\nAssistant:", "\n\nhuman:", "\n\nassistant:")


def test_a_stop_string_may_come_in_tokens_of_many_bytes_or_one() -> None:
    tokenizer = tiny.build_tokenizer()
    ends = Ending(tokenizer, {2}, ("stöp",))
    ids = tokenizer("xx stöp", add_special_tokens=False)["input_ids"]
    assert [ends(ids[:i]) for i in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]
    assert ends([50, 2])
    assert not Ending(tokenizer, {2}, ())(ids)


# --- what training gets -------------------------------------------------------------------------------------------


def test_training_reads_the_very_tokens_that_were_sampled() -> None:
    made = engine(build(ends=MANY_ENDS), n=4, max_new_tokens=20, temperature=1.5)
    encoder = batching.Encoder(made.tokenizer, batching.EncodeOptions(judge="any"))
    answers = made.generate(PROMPTS)
    drift, drawn = 0, set()
    for response in (r for row in answers for r in row):
        assert response.tokens is not None
        assert response.tokens["tokenizer"] == tokenizer_fingerprint(made.tokenizer)
        ids = response.tokens["ids"]
        assert response.text == made.tokenizer.decode(ids, skip_special_tokens=True)
        end = response.tokens.get("end", 2)
        drawn |= {end} if response.finished else set()
        assert encoder.response(response) == ids + [end] * response.finished
        drift += batching.encode_text(made.tokenizer, response.text) != ids
    assert drift > 0  # random bytes are seldom UTF-8: from the text alone, training would see other tokens
    assert len(drawn) > 1  # and it learns the end that was drawn, which is not always the template's
    assert drawn <= set(MANY_ENDS)


def test_records_hold_the_answers(tmp_path: Path) -> None:
    answers = engine(n=2, max_new_tokens=6).generate(PROMPTS[:2])
    sets = [dataclasses.replace(p, responses=list(row)) for p, row in zip(PROMPTS, answers, strict=False)]
    records.write(tmp_path / "out.jsonl", sets)
    assert list(records.read(tmp_path / "out.jsonl")) == sets


# --- batches, settings --------------------------------------------------------------------------------------------


def test_batches_are_by_length_within_limits() -> None:
    made = engine(n=4, max_new_tokens=8)
    prompts = [CandidateSet(str(i), "x" * (1 + 37 * i % 101)) for i in range(100)]
    batches = made.batches(prompts)
    assert batches == made.batches(prompts)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(100))
    lengths = [len(str(prompts[i].prompt)) for i in flat]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [MAX_ROWS // 4] * 6 + [100 - 6 * (MAX_ROWS // 4)]
    huge = engine(n=1, max_new_tokens=MAX_TOKENS // 2 - 20).batches(PROMPTS)
    assert all(len(batch) <= 2 for batch in huge)
    assert engine(n=MAX_ROWS + 1).batches(PROMPTS) == [[i] for i in reversed(range(8))]
    assert made.batches([]) == []


def test_a_prompt_too_long_for_the_model_is_told() -> None:
    with pytest.raises(InputError, match=r"prompt 'p7' has \d+ tokens, which with max_new_tokens 500 exceeds .* 512"):
        engine(max_new_tokens=500).generate(PROMPTS[7:])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -0.1}, "temperature must not be negative"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop": ("",)}, "empty"),
        ({"num_beams": 4, "num_beam_groups": 3}, "multiple"),
        ({"num_beams": 2, "n": 3}, "n must not exceed"),
        ({"num_beams": 2, "temperature": 0.8}, "searched, not drawn"),
        ({"num_beams": 2, "top_k": 5}, "searched, not drawn"),
        ({"num_beams": 2, "diversity_penalty": 1.0}, "needs num_beam_groups"),
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": -1.0}, "negative"),
        ({"num_beam_groups": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        SamplingParams(**settings)


def test_an_unknown_template_is_told_before_anything_loads() -> None:
    with pytest.raises(InputError, match="did you mean 'alpaca'"):
        HFEngine(Policy("x", template="alpacca"))


def test_the_model_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path))
    made = HFEngine(Policy("tiny-a", model="tiny", sampling=SamplingParams(max_new_tokens=4)))
    assert made.generate(PROMPTS[:2]) == engine(max_new_tokens=4).generate(PROMPTS[:2])


def test_the_end_of_a_turn_ends_an_answer_though_the_generation_config_does_not_name_it() -> None:
    made = engine(build(), n=4, max_new_tokens=200, temperature=2.0)
    made.tokenizer = tiny.build_tokenizer()
    made.tokenizer.chat_template = made.tokenizer.chat_template.replace("eos_token", "'<|system|>'")
    turn = made.tokenizer.convert_tokens_to_ids("<|system|>")
    encoder = batching.Encoder(made.tokenizer, batching.EncodeOptions())
    assert encoder.response(Response("a"))[-1] == turn
    drawn = set()
    for response in (r for row in made.generate(PROMPTS) for r in row if r.finished):
        assert response.tokens is not None
        drawn.add(response.tokens["end"])
        assert turn not in response.tokens["ids"]
        assert encoder.response(response) == [*response.tokens["ids"], response.tokens["end"]]
    assert turn in drawn
