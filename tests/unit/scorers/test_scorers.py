"""Scorers: what functions are called with and may return; rewards against transformers, one text at a time."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rankalign.config import ScorerConfig
from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.models import adapters, tiny
from rankalign.models import load as models
from rankalign.scorers import SCORERS, attach, grade, reward_model
from rankalign.scorers.function import FunctionScorer
from rankalign.scorers.reward_model import RewardModelScorer
from rankalign.stages.generation import build_scorer
from tests.faults.server import reward_server
from tests.unit.scorers.token_classifier import token_classifier

SETS = [
    CandidateSet("a", "Say hi. ", [Response("hi", "p"), Response("hello there", "q", finished=False)], {"ref": "hey"}),
    CandidateSet("none", "Nobody answered."),
    CandidateSet("b", [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], [Response("good", "p")]),
]

# --- functions ----------------------------------------------------------------------------------------------------

CODE = """
from __future__ import annotations
import dataclasses
import torch

@dataclasses.dataclass
class Options:
    scale: float = 1.0

def lengths(samples): return [len(s) for s in samples]
def any_name(texts): return [float(len(t)) for t in texts]
def outputs_only(outputs): return [len(o) for o in outputs]
def trlx(samples, prompts, outputs, **metadata):
    assert all(s == p + o for s, p, o in zip(samples, prompts, outputs) if p != "S\\n\\nU")
    trlx.seen = dict(metadata, samples=samples, prompts=prompts, outputs=outputs)
    return [1, 2, 3]
def trlx_tokenizer(samples, prompts, outputs, tokenizer, ref): return [0.0 if r is None else len(r) for r in ref]
def keyword_only(*, samples, bonus=0.0): return [bonus] * len(samples)
def only_keywords(**everything): return [len(everything["outputs"])] * len(everything["samples"])
def needs(samples, colour): return [0.0] * len(samples)
def per_token(samples): return [[0.5, 0.25], [], torch.tensor([1.0, 2.0, 3.0])]
def missing(samples): return [None, 1, torch.tensor(2.5)]
def tensor(samples): return torch.tensor([0.5, 1.0, 2.0])
def too_few(samples): return [1.0]
def not_a_list(samples): return 3.0
def nan(samples): return [1.0, float("nan"), 2.0]
def infinite(samples): return [1.0, 2.0, float("inf")]
def text(samples): return ["1", 2, 3]
def true(samples): return [True, 2, 3]
def axes(samples): return [{"kind": 1.5, "brief": torch.tensor(2)}, 2, {"kind": -1}]
def mapping(samples): return [{"score": "high"}, 2, 3]
def no_axes(samples): return [{}, 2, 3]
def raises(samples): raise KeyError("lexicon")
constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def scorer(file: Path, name: str, **options: Any) -> FunctionScorer:
    return FunctionScorer("mine", f"{file}:{name}", **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lengths", [[10, 19], [], [len("S\n\nU\n\ngood")]]),
        ("any_name", [[10, 19], [], [10]]),
        ("outputs_only", [[2, 11], [], [4]]),
        ("trlx", [[1, 2], [], [3]]),
        ("trlx_tokenizer", [[3, 3], [], [0]]),
        ("keyword_only", [[0, 0], [], [0]]),
        ("only_keywords", [[3, 3], [], [3]]),
        ("per_token", [[0.75, 0.0], [], [6.0]]),
        ("axes", [[3.5, 2.0], [], [-1.0]]),
        ("missing", [[None, 1.0], [], [2.5]]),
        ("tensor", [[0.5, 1.0], [], [2.0]]),
    ],
)
def test_accepted_functions(file: Path, name: str, expected: list[list[float | None]]) -> None:
    assert scorer(file, name).score(SETS) == expected


def test_sub_scores_of_a_function_are_kept(file: Path) -> None:
    made, sets = scorer(file, "axes"), copy.deepcopy(SETS)
    for record, grades in zip(sets, grade(made, sets), strict=True):
        attach(record, "mine", grades)
    first, second, third = [response for record in sets for response in record.responses]
    assert (first.scores, first.meta) == ({"mine": 3.5}, {"judge:mine": {"ratings": {"kind": 1.5, "brief": 2.0}}})
    assert (second.scores, second.meta) == ({"mine": 2.0}, {})
    assert (third.scores, third.meta) == ({"mine": -1.0}, {"judge:mine": {"ratings": {"kind": -1.0}}})
    assert sets[0].meta == SETS[0].meta


def test_what_a_function_is_given(file: Path) -> None:
    made = scorer(file, "trlx", scale=2.0)
    made.score(SETS)
    assert made._function.seen == {  # type: ignore[attr-defined]
        "samples": ["Say hi. hi", "Say hi. hello there", "S\n\nU\n\ngood"],
        "prompts": ["Say hi. ", "Say hi. ", "S\n\nU"],
        "outputs": ["hi", "hello there", "good"],
        "ref": ["hey", "hey", None],
        "scale": 2.0,
        "tokenizer": None,
    }
    assert scorer(file, "keyword_only", bonus=1.5).score(SETS) == [[1.5, 1.5], [], [1.5]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("too_few", "must return a list of 3 scores, not 1"),
        ("not_a_list", "must return a list of 3 scores, not a float"),
        ("nan", "returned nan for a response to 'a': not finite"),
        ("infinite", "returned inf for a response to 'b': not finite"),
        ("text", "returned '1' for a response to 'a': not a number"),
        ("true", "returned True for a response to 'a': not a number"),
        ("mapping", "not a number"),
        ("no_axes", "not a number"),
        ("raises", "raised KeyError: 'lexicon'"),
        ("needs", "missing a required argument: 'colour'"),
    ],
)
def test_refused_results(file: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        scorer(file, name).score(SETS)
    assert f"scorer 'mine': function {file}:{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("math", "write module:name"),
        ("math:", "write module:name"),
        ("math:sqrtt", "did you mean 'sqrt'"),
        ("math:pi", "is no function but a float"),
    ],
)
def test_functions_that_are_not_there(spec: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        FunctionScorer("mine", spec)


def test_a_file_that_fails_and_an_option_that_nobody_takes(file: Path) -> None:
    with pytest.raises(InputError, match=r"takes no option 'bonsu' \(did you mean 'bonus'"):
        scorer(file, "keyword_only", bonsu=1)
    file.write_text("raise RuntimeError('at import')")
    with pytest.raises(InputError, match="cannot be imported: RuntimeError: at import"):
        scorer(file, "lengths")


def test_function_fingerprint_follows_the_code(file: Path) -> None:
    first = scorer(file, "lengths").fingerprint()
    assert first["sha256"] == hashlib.sha256(CODE.encode()).hexdigest()
    assert scorer(file, "lengths").fingerprint() == first
    assert scorer(file, "keyword_only", bonus=1).fingerprint()["options"] == {"bonus": 1}
    file.write_text(CODE + "# changed\n")
    assert scorer(file, "lengths").fingerprint() != first


def test_a_function_may_ask_who_answered() -> None:
    answers = [Response("hm", "drawn"), Response("yes", "dataset")]
    scorer = FunctionScorer("people", "rankalign.scorers.builtin:written_by", policy="dataset")
    assert scorer.score([CandidateSet("1", "so?", answers), CandidateSet("2", "so?", answers[::-1])]) == [
        [0, 1],
        [1, 0],
    ]
    seen: list[Any] = []

    def others(samples: Any, **metadata: Any) -> list[float]:
        seen.append(metadata)
        return [0.0 for _ in samples]

    FunctionScorer("others", others).score([CandidateSet("1", "so?", answers, {"policies": "theirs"})])
    assert seen[0]["policies"] == ["theirs", "theirs"]  # what takes all there is gets the record's own


def test_builtin_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FunctionScorer("w", "rankalign.scorers.builtin:words").score(SETS) == [[1, 2], [], [1]]
    pytest.importorskip("vader")
    ((hi, hello), _, (good,)) = FunctionScorer("v", "rankalign.scorers.builtin:vader").score(SETS)
    assert (hi, hello) == (0.0, 0.0)
    assert good == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=1e-4)  # lexicon weight 1.9, alpha 15


def test_vader_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankalign.scorers import builtin

    builtin._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vader", None)
    with pytest.raises(InputError, match=r"pip install 'rankalign\[demo\]'"):
        FunctionScorer("v", "rankalign.scorers.builtin:vader").score(SETS)


# --- reward models ------------------------------------------------------------------------------------------------

TEXTS = ["yes", "no, and here is a long reason why not", "", "maybe", "an answer", "x" * 40, "ok", "well then"]
MANY = [
    CandidateSet(f"r{i}", "question " * (i % 3 + 1), [Response(t, "p", finished=i % 2 == 0) for t in TEXTS[i:]])
    for i in range(8)
]


def rm(model: Any = None, tokenizer: Any = None, **options: Any) -> RewardModelScorer:
    made = RewardModelScorer("rm", model="tiny-rm", **options)
    model = tiny.build_tiny_reward_model() if model is None else model
    made._loaded = (model.eval(), tokenizer or tiny.build_tokenizer())
    return made


def flat(scores: Sequence[Sequence[float | None]]) -> list[float]:
    return [score for row in scores for score in row if score is not None]


def texts_of(made: RewardModelScorer, sets: Sequence[CandidateSet]) -> list[list[int]]:
    """Each whole conversation as the reward model's template writes it; a cut answer ends where it ends."""
    found = []
    for record in sets:
        asked: Any = [{"role": "user", "content": record.prompt}]
        for r in record.responses:
            said = [*asked, {"role": "assistant", "content": r.text}]
            text = made.tokenizer.apply_chat_template(said, tokenize=False)
            text = text if r.finished else text.removesuffix("<|eos|>\n")
            found.append(made.tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def test_rewards_equal_transformers_one_by_one_and_padded_on_the_left() -> None:
    made = rm()
    scores = flat(made.score(MANY))
    texts = texts_of(made, MANY)
    alone = [made.model(input_ids=torch.tensor([ids])).logits.item() for ids in texts]
    assert scores == pytest.approx(alone, abs=1e-5)
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    left = made.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0].tolist()
    assert scores == pytest.approx(left, abs=1e-5)
    assert max(scores) - min(scores) > 0.1


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Bert", "Roberta"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_rewards_do_not_depend_on_the_batch(family: str, pad_is_eos: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 262, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 160, "n_embd": 32, "n_head": 4, "n_layer": 2}
    sizes |= {"word_embed_proj_dim": 32, "ffn_dim": 64} if family == "OPT" else {}
    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token if pad_is_eos else tokenizer.pad_token
    config = getattr(transformers, f"{family}Config")(num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    alone, together = (flat(rm(model, tokenizer, batch_size=size).score(MANY)) for size in (1, 8))
    assert alone == pytest.approx(together, abs=1e-5)
    expected = [
        model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits.item()
        for ids in texts_of(rm(model, tokenizer), MANY)
    ]
    assert alone == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in alone}) > 10


def test_where_a_reward_is_read() -> None:
    tokenizer = tiny.build_tokenizer()
    ids = torch.tensor([[5, 6, 2, 0, 0], [5, 2, 7, 2, 2], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    config = tiny.build_tiny_reward_model().config
    cases: list[tuple[int | None, str | None, list[int]]] = [
        (tokenizer.pad_token_id, None, [2, 3, 4]),
        (2, None, [1, 2, 4]),  # padding is the end of sequence: the token before it, as transformers has it
        (None, None, [2, 3, 4]),
        (2, "last", [2, 3, 4]),
    ]
    for pad, rule, expected in cases:
        config.pad_token_id, config.rankalign_pooling = pad, rule
        assert reward_model._last(ids, mask, config).tolist() == expected
    config.rankalign_pooling = "median"
    with pytest.raises(InputError, match="pools by 'median'"):
        reward_model._last(ids, mask, config)


def test_padding_that_is_the_end_reads_the_end_where_the_config_says_so() -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny.build_tiny_reward_model()
    model.config.pad_token_id, model.config.rankalign_pooling = 2, "last"
    made = rm(model, tokenizer)
    hidden = [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in texts_of(made, MANY)]
    expected = [model.score(h).item() for h in hidden]
    assert flat(made.score(MANY)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rule", ["first_eos", "mean", "last"])
def test_a_rule_that_a_foreign_checkpoint_does_not_tell_is_an_option(rule: str) -> None:
    """Against the model's states text by text, with several answers a prompt and with one."""
    made = RewardModelScorer("rm", "tiny-rm", pooling=rule)
    assert made.fingerprint()["pooling"] == rule
    sets = [
        CandidateSet("a", "q", [Response("one"), Response("two", finished=False)]),
        CandidateSet("b", "p", [Response("x")]),
    ]
    texts = [made._encode(record, response) for record in sets for response in record.responses]
    expected = []
    for ids in texts:
        said = made.model.score(made.model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, :, 0]
        expected.append(said.mean().item() if rule == "mean" else said[-1].item())
    assert flat(made.score(sets)) == pytest.approx(expected, abs=1e-5)
    assert made._rewards(texts) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match=r"pools by 'median'.*first_eos, mean"):
        RewardModelScorer("rm", "tiny-rm", pooling="median").score(sets)


def test_truncation_is_that_of_training_and_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    made = rm(max_length=20, template="raw")
    record = CandidateSet("long", "0123456789" * 3)
    tokenizer = made.tokenizer
    ids = made._encode(record, Response("answer", "p"))
    assert tokenizer.decode(ids) == "<|bos|>890123456789" + "answer" + "<|eos|>"
    assert len(ids) == 20
    assert made.counts == {"prompt_truncated": 1, "response_truncated": 0}
    ids = made._encode(record, Response("x" * 30 + "END", "p"))
    assert tokenizer.decode(ids) == "<|bos|>123456789" + "x" * 10
    assert made.counts == {"prompt_truncated": 2, "response_truncated": 1}
    assert len(made._encode(CandidateSet("s", "short"), Response("yes", "p"))) < 20
    assert made.counts["prompt_truncated"] == 2
    assert capsys.readouterr().err == "scorer 'rm': texts above 20 tokens are cut\n"
    assert rm().max_length == 512
    assert rm(max_length=9999).max_length == 512


def test_reward_model_settings_and_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    made = RewardModelScorer("rm", model="tiny-rm", batch_size=3)
    assert made.score(SETS) == [[pytest.approx(s, abs=1e-6) for s in row] for row in rm().score(SETS)]
    first = made.fingerprint()
    assert first == RewardModelScorer("other", model="tiny-rm", batch_size=5).fingerprint()
    assert first["weights"] == models.weights_fingerprint(tiny.build_tiny_reward_model())
    assert first != RewardModelScorer("rm", model="tiny-rm", template="raw").fingerprint()
    with pytest.raises(InputError, match="batch_size and max_length must be 0 or more"):
        RewardModelScorer("rm", model="tiny-rm", batch_size=-1)
    with pytest.raises(InputError, match="unknown template"):
        RewardModelScorer("rm", model="tiny-rm", template="none")
    with pytest.raises(InputError, match="is no reward model"):
        RewardModelScorer("rm", model="tiny").score(SETS)


def test_an_adapters_fingerprint_is_that_of_its_files(tmp_path: Path) -> None:
    model, tokenizer = models.load_reward_model("tiny")
    adapters.add_lora(model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first, second = (RewardModelScorer("rm", model=str(tmp_path)).fingerprint() for _ in range(2))
    assert first == second  # the base's own head is random anew at each loading
    assert first["weights"] != RewardModelScorer("rm", model="tiny-rm").fingerprint()["weights"]


@pytest.mark.parametrize("kind", list(SCORERS))
def test_every_scorer_keeps_the_contract(kind: str, file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    policy = {"engine": "hf", "model": "tiny", "max_new_tokens": 4}
    short = {"name": "short", "type": "single", "prompt_template": "{answer}", "output_format": "[[rating]]"}
    (tmp_path / "short.jsonl").write_text(json.dumps(short) + "\n")
    options: dict[str, Any] = {
        "function": {"function": f"{file}:lengths"},
        "judge": {"policy": policy, "prompt": str(tmp_path / "short.jsonl"), "hardened": False, "repair": False},
        "reward_model": {"model": "tiny-rm"},
        "reward_server": {"url": reward_server()},
        "token_rewards": {"model": token_classifier(tmp_path)},
    }
    made = SCORERS.load(kind)("judge", **options[kind])
    before = repr(SETS)
    scores = made.score(SETS)
    assert made.name == "judge"
    assert [len(row) for row in scores] == [2, 0, 1]
    assert repr(SETS) == before
    again = made.score(SETS[::-1])[::-1]
    assert again == [[None if s is None else pytest.approx(s, abs=1e-6) for s in row] for row in scores]
    assert made.score([]) == []
    assert made.fingerprint() == SCORERS.load(kind)("judge", **options[kind]).fingerprint()


TYPED = """
def reward_fn(samples, factor=1):
    return [float(len(s) * factor + {bonus}) for s in samples]
"""


@pytest.mark.parametrize("source", ["<stdin>", "<ipython-input-3>", f"{tempfile.gettempdir()}/ipykernel_7/123.py"])
def test_a_function_typed_at_a_prompt_is_named_by_what_it_does(source: str) -> None:
    """A notebook's, a shell's and stdin's functions lie in no file; the report was a FileNotFoundError."""

    def typed(bonus: int) -> FunctionScorer:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(TYPED.format(bonus=bonus), source, "exec"), space)
        return FunctionScorer("r", space["reward_fn"])

    prints = [typed(bonus).fingerprint()["sha256"] for bonus in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 64
    bound = [FunctionScorer("r", functools.partial(typed(1)._function, factor=k)).fingerprint() for k in (1, 1, 2)]
    assert bound[0] == bound[1] != bound[2]
    assert (bound[0]["function"], bound[0]["sha256"]) == ("__main__:reward_fn", prints[0])


def test_a_function_that_nothing_names_is_refused() -> None:
    with pytest.raises(InputError, match="put it into a file"):
        FunctionScorer("r", sum).fingerprint()
    with pytest.raises(InputError, match="does not say what it takes"):
        FunctionScorer("r", map)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("batch_size", "x", "scorer 'r': batch_size: expected int, found 'x'"),
        ("batch_size", 2.5, "expected int, found 2.5"),
        ("max_length", None, "expected int, found None"),
        ("template", 3, "expected str, found 3"),
        ("system", 3, "expected str, found 3"),
        ("allow_special_in_text", "no", "expected bool, found 'no'"),
        ("axis", ["a"], "axis: expected a name, an index or mean"),
    ],
)
def test_options_of_the_wrong_kind_are_named(option: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_scorer(ScorerConfig("r", "reward_model", {"model": "tiny-rm", option: value}))
