"""Reward models: rewards equal to plain transformers', training that does what its flags say."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankalign.data.encode import TokenList
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.rows import rewards
from rankalign.scorers.reward_model import RewardModelScorer
from rankalign.training import reward as reward_module
from rankalign.training.arguments import TrainConfig, parse_settings
from rankalign.training.examples import Example
from rankalign.training.meter import Meter
from rankalign.training.reward import RewardTrainer, one_score_a_text, pad_apart_from_end
from rankalign.training.run import train

EOS, PAD = 2, 0  # of the tiny tokenizer


# --- where a reward is read --------------------------------------------------------------------------------------


def test_read_part() -> None:
    config = tiny.build_tiny_reward_model().config
    cases: list[tuple[int | None, str | None, list[int], list[int], list[int], list[int]]] = [
        (PAD, None, [1, 5], [6, EOS], [1, 5], [6, EOS]),
        (PAD, "last_non_pad", [1, 5], [6, EOS], [1, 5], [6, EOS]),
        (EOS, None, [1, 5], [6, EOS], [1, 5], [6]),  # padding is the end: the token before it, as transformers has it
        (EOS, None, [1, 5, EOS], [6, EOS], [1, 5], [EOS, 6]),
        (EOS, None, [1, 5, EOS], [EOS], [1, 5], []),
        (EOS, None, [EOS], [EOS], [EOS], []),  # nothing but padding: the first token, as transformers has it
        (EOS, "last", [1, 5], [6, EOS], [1, 5], [6, EOS]),
        (None, None, [1, 5], [6, EOS], [1, 5], [6, EOS]),
        (PAD, "first_eos", [1, 5], [6, EOS, 7, EOS], [1, 5], [6, EOS]),
        (EOS, "first_eos", [1, 5], [6, EOS, 7], [1, 5], [6, EOS]),  # padding is the end, and the end is read
        (PAD, "first_eos", [1, EOS, 5], [6, 7], [1, EOS, 5], [6, 7]),  # no end: the last token, never the first
        (EOS, "first_eos", [1, EOS, 5], [6, 7, EOS], [1, EOS, 5], [6, 7, EOS]),  # the prompt's end does not count
        (EOS, "first_eos", [1, 5], [], [1, 5], []),
        (EOS, "mean", [1, 5, EOS], [6, EOS], [1], [5, EOS, 6, EOS]),
    ]
    for pad, rule, prompt, response, front, back in cases:
        config.pad_token_id, config.rankalign_pooling = pad, rule
        assert rewards.read_part(prompt, [response], config) == (front, [back])
    config.rankalign_pooling = "median"
    with pytest.raises(InputError, match="pools by 'median'"):
        rewards.read_part([1], [[2]], config)


@pytest.mark.parametrize("rule", ["first_eos", "mean", "last"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_other_poolings_are_their_definition_text_by_text(rule: str, layout: str) -> None:
    model = tiny.build_tiny_reward_model()
    model.config.rankalign_pooling, model.config.pad_token_id = rule, EOS
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    prompts, lists = [[1, 5, EOS, 8], [1, 9]], [[[6, EOS, 7], [6, 7, 9], [EOS]], [[4, 4, EOS]]]
    with torch.no_grad():
        found = rewards.list_rewards(model, prompts, lists, layout=layout)
        fixed = rewards.rewards_of(
            model, [rewards.end_states(model, [p], [r], layout=layout)[0] for p, r in zip(prompts, lists, strict=True)]
        )
        for p, responses in enumerate(lists):
            for n, response in enumerate(responses):
                said = model.score(model.model(torch.tensor([prompts[p] + response])).last_hidden_state)[0, :, 0]
                if rule == "mean":
                    wanted = said.mean()
                elif rule == "first_eos" and EOS in response:
                    wanted = said[len(prompts[p]) + response.index(EOS)]
                else:
                    wanted = said[-1]
                assert found[p, n].item() == pytest.approx(wanted.item(), abs=1e-5)
                assert fixed[p, n].item() == pytest.approx(wanted.item(), abs=1e-5)


def bare_tokenizer() -> Any:
    """Like that of GPT-2: bytes and one special token, which begins, ends and pads."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    backend = Tokenizer(token_models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    end: Any = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **end)


def test_padding_is_set_apart_from_the_end_where_a_token_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pad_apart_from_end(tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
    bare = bare_tokenizer()
    pad_apart_from_end(bare)
    assert bare.pad_token == bare.eos_token
    assert "read at the token before it" in capsys.readouterr().err


FAMILIES = {
    "Llama": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "OPT": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64},
    "Bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},  # no tree rows: falls back on padded ones
}  # fmt: skip


def classifier(family: str, pad: int) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, num_labels=1, pad_token_id=pad, max_position_embeddings=64, **FAMILIES[family]
    )
    config.update({"word_embed_proj_dim": 32} if family == "OPT" else {})
    config.update({name: 0.0 for name in ("dropout", "attention_dropout", "hidden_dropout") if hasattr(config, name)})
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)
    return model


RAGGED = (
    [[1, 5, 6, 7], [9], [1, 8, EOS]],
    [[[10, 11, EOS], [12, EOS], [13] * 6], [[EOS], [20, 21]], [[30, 31, 32, EOS], [EOS], [33], [34, EOS, EOS, 35]]],
)


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_padded_and_one_by_one_agree_in_value_and_gradient(family: str, pad: int) -> None:
    model = classifier(family, pad)
    slopes = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for layout in ("one", "padded", "auto"):
        model.zero_grad()
        if layout == "one":
            rows = [[model(torch.tensor([p + r])).logits[0, 0] for r in rs] for p, rs in zip(*RAGGED, strict=True)]
            found = torch.stack([torch.stack(row + [row[0] * 0] * (4 - len(row))) for row in rows])
        else:
            found = rewards.list_rewards(model, *RAGGED, layout=layout)
        (found * slopes).sum().backward()
        results.append((found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (values, gradients), *others = results
    assert len(values.unique()) >= 9
    # Bloom takes its softmax in float32 whatever its weights are, so how much of it rounds is the processor's affair.
    near = {"rtol": 1e-5, "atol": 1e-5} if family == "Bloom" else {"rtol": 1e-6, "atol": 1e-6}
    for found, grads in others:
        torch.testing.assert_close(found, values, **near)
        assert grads.keys() == gradients.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, gradients[name], **near)


def test_token_rewards_end_in_the_reward() -> None:
    model = classifier("Llama", EOS)
    pieces = rewards.token_rewards(model, *RAGGED)
    assert [[len(v) for v in row] for row in pieces] == [[3, 2, 7], [1, 3], [5, 1, 3, 6]]
    values = rewards.list_rewards(model, *RAGGED)
    assert pieces[2][3][-1].item() == values[2, 3].item()
    hidden = model.model(torch.tensor([[1, 5, 6, 7, 10, 11]])).last_hidden_state
    torch.testing.assert_close(pieces[0][0], model.score(hidden)[0, 3:, 0])


def test_layout_is_chosen_by_comparing_and_foreign_heads_are_refused() -> None:
    assert rewards.choose_layout(classifier("Llama", PAD), *RAGGED)[0] == "tree"
    assert rewards.choose_layout(classifier("Bloom", PAD), *RAGGED)[0] == "padded"
    model = classifier("Llama", PAD)
    model.score.register_forward_hook(lambda module, args, out: out if out.dim() == 2 else out + 1)
    with pytest.raises(InputError, match="in a way that rankalign does not know"):
        rewards.choose_layout(model, *RAGGED)
    with pytest.raises(InputError, match="have no reward head"):
        rewards.list_rewards(tiny.build_model(), *RAGGED)


# --- the trainer -------------------------------------------------------------------------------------------------


def settings(tmp_path: Path, **more: Any) -> TrainConfig:
    fixed = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return parse_settings({**fixed, "method": "reward", **more})


def examples() -> list[Example]:
    graded = [[2.0, 1.0, 1.0], [0.0, 1.0], [3.0, 2.0, 1.0, 0.0]]
    return [Example(TokenList(f"p{i}", *list_, s)) for i, (*list_, s) in enumerate(zip(*RAGGED, graded, strict=True))]


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", "per_token", "quality"])
def test_the_trainers_loss_is_its_formula_over_plain_rewards(tmp_path: Path, loss: str) -> None:
    model, lists = classifier("Llama", PAD), examples()
    trainer = RewardTrainer(model, settings(tmp_path, loss=loss), lists)
    meter = Meter()
    found = trainer.losses(model, lists, meter)
    for value, e in zip(found.tolist(), lists, strict=True):
        t = e.tokens
        states = [
            model.score(model.model(torch.tensor([t.prompt + r])).last_hidden_state)[0, :, 0] for r in t.responses
        ]
        traces, r = [v[len(t.prompt) :].tolist() for v in states], [v[-1].item() for v in states]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if t.scores[i] > t.scores[j]]
        if loss == "bradley_terry":
            by_hand = sum(math.log1p(math.exp(r[j] - r[i])) for i, j in pairs) / len(pairs)
        elif loss == "plackett_luce":
            below = [[j for i, j in pairs if i == k] for k in range(len(r))]
            by_hand = sum(math.log1p(sum(math.exp(r[j] - r[k]) for j in js)) for k, js in enumerate(below))
        elif loss == "quality":
            by_hand = sum(abs(1 / (1 + math.exp(-x)) - s / 10) for x, s in zip(r, t.scores, strict=True)) / len(r)
        else:
            means = []
            for i, j in pairs:
                a, b = t.responses[i], t.responses[j]
                start = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                steps = range(start, max(len(a), len(b)))
                gaps = [traces[i][min(k, len(a) - 1)] - traces[j][min(k, len(b) - 1)] for k in steps]
                means.append(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps))
            by_hand = sum(means) / len(means)
        assert value == pytest.approx(by_hand, abs=1e-6)
    values = rewards.list_rewards(model, *RAGGED)
    assert meter.read()["mean_reward"] == pytest.approx(
        sum((values[i, : len(r)].mean().item()) for i, r in enumerate(RAGGED[1])) / 3
    )


def test_accuracy_and_margin_go_by_reward(tmp_path: Path) -> None:
    model, lists = classifier("Llama", PAD), examples()
    trainer = RewardTrainer(model, settings(tmp_path), lists)
    fixed = torch.tensor([[1.0, 2.0, -1.0, 0.0], [0.5, 0.25, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    trainer.values = lambda model, examples: fixed  # type: ignore[method-assign]
    meter = Meter()
    trainer.losses(model, lists, meter)
    logs = meter.read()
    assert (logs["pairs"], logs["tied_pairs"]) == (9, 1)  # (2, 1, 1), (0, 1), (3, 2, 1, 0)
    assert logs["ranking_accuracy"] == pytest.approx(7 / 9)
    assert logs["margin"] == pytest.approx((-1 + 2 - 0.25 + 1 + 2 + 3 + 1 + 2 + 1) / 9)
    assert logs["mean_reward"] == pytest.approx((2 / 3 + 0.375 + 2.5) / 3)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", "per_token"])
def test_equal_responses_are_not_compared(tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier("Llama", EOS)
    same = Example(TokenList("p", [1, 5], [[6, 7], [6, 7, EOS]], [2.0, 1.0]))  # the end is not read: they are equal
    trainer = RewardTrainer(model, settings(tmp_path, loss=loss), [same])
    assert "in 1 prompts, equal responses share the mean" in capsys.readouterr().err
    found = trainer.losses(model, trainer.train_dataset.examples, Meter())  # type: ignore[union-attr]
    found.sum().backward()
    assert found.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    three = TokenList("p", [1], [[6], [6], [7]], [3.0, 0.0, 1.0])
    assert one_score_a_text(three, model.config).scores == [1.5, 1.5, 1.0]


# --- whole runs --------------------------------------------------------------------------------------------------


def letters_or_digits(count: int, seed: int) -> list[CandidateSet]:
    """Strings of which one is all letters and the others are not: a mean of embeddings tells them apart."""
    rng = random.Random(seed)
    sets = []
    for i in range(count):
        texts = ["".join(rng.choices(alphabet, k=8)) for alphabet in ("abcdefgh", "12345678", "abcd1234")]
        responses = [Response(text, scores={"j": s}) for text, s in zip(texts, (2.0, 0.0, 1.0), strict=True)]
        sets.append(CandidateSet(f"p{i}", f"string {i} please", responses))
    return sets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data.jsonl", letters_or_digits(8, 0))
    write(tmp_path / "eval.jsonl", letters_or_digits(12, 1))
    return tmp_path / "data.jsonl"


def run(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    fixed = {"model": "tiny", "data": str(data), "output_dir": str(output), "save_strategy": "no"}
    fixed |= {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    return train(settings(output.parent, **{**fixed, "learning_rate": 1e-3, **more}))


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_separable_set_is_learnt(tmp_path: Path, data: Path) -> None:
    write(data, letters_or_digits(48, 0))
    more = {"eval_data": str(tmp_path / "eval.jsonl"), "eval_strategy": "epoch", "learning_rate": 5e-3}
    run(data, tmp_path / "run", num_train_epochs=6, **more)
    found = [line for line in log(tmp_path / "run") if "eval_ranking_accuracy" in line]
    assert found[-1]["eval_ranking_accuracy"] > 0.95
    assert found[-1]["eval_margin"] > 0
    assert {"loss", "ranking_accuracy", "margin", "mean_reward", "tied_pairs"} <= log(tmp_path / "run")[0].keys()


def policy_folder(folder: Path, kind: str) -> str:
    """A policy whose tokenizer pads with the end of sequence, with other special tokens or without."""
    if kind == "free token":
        tokenizer: Any = tiny.build_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        model: Any = tiny.build_model()
        model.config.pad_token_id = EOS
    else:
        tokenizer = bare_tokenizer()
        end = tokenizer.eos_token_id
        config = transformers.GPT2Config(
            vocab_size=257, n_embd=32, n_head=4, n_layer=2, bos_token_id=end, eos_token_id=end, pad_token_id=end
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rule", ["mean", "first_eos"])
def test_a_trained_folder_says_how_it_pools_and_is_scored_so(tmp_path: Path, data: Path, rule: str) -> None:
    run(data, tmp_path / "run", pooling=rule, num_train_epochs=1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rankalign_pooling"] == rule
    made = RewardModelScorer("rm", str(tmp_path / "run"))
    record = CandidateSet("a", "q", [Response("one"), Response("two words")])
    texts = [torch.tensor([made._encode(record, response)]) for response in record.responses]
    said = [made.model.score(made.model.model(ids).last_hidden_state)[0, :, 0] for ids in texts]
    expected = [(values.mean() if rule == "mean" else values[-1]).item() for values in said]
    assert made.score([record])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["free token", "no free token"])
def test_plain_transformers_scores_the_folder_as_we_do(tmp_path: Path, data: Path, kind: str) -> None:
    run(data, tmp_path / "run", model=policy_folder(tmp_path / "policy", kind), num_train_epochs=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rankalign_pooling"] == "last_non_pad"
    assert config["architectures"][0].endswith("ForSequenceClassification")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.pad_token_id == config["pad_token_id"]
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (kind == "no free token")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    answers = ["yes", "a longer answer", "", "12"]
    prompt = tokenizer("say")["input_ids"]
    ends = [[tokenizer.eos_token_id] * (i % 2 == 0) for i in range(4)]
    parts = [tokenizer(a, add_special_tokens=False)["input_ids"] + e for a, e in zip(answers, ends, strict=True)]
    encoded = tokenizer.pad({"input_ids": [prompt + part for part in parts]}, padding_side="right", return_tensors="pt")
    theirs = plain(**encoded).logits[:, 0]
    left = tokenizer.pad({"input_ids": [prompt + part for part in parts]}, padding_side="left", return_tensors="pt")
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(plain(**left, position_ids=positions).logits[:, 0], theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards.list_rewards(plain, [prompt], [parts])[0], theirs, rtol=0, atol=1e-5)
    record = CandidateSet("r", "say", [Response(a, finished=i % 2 == 0) for i, a in enumerate(answers)])
    for size in (1, 8):
        scorer = RewardModelScorer("rm", str(tmp_path / "run"), template="raw", batch_size=size)
        assert scorer.score([record])[0] == pytest.approx(theirs.tolist(), abs=1e-5)
    assert len({round(x, 4) for x in theirs.tolist()}) == 4


def test_a_reward_model_goes_on_with_its_head(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", model="tiny-rm", learning_rate=0.0)
    before, after = (models.weights_fingerprint(str(f)) for f in (models.resolve("tiny-rm"), tmp_path / "run"))
    assert before == after


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_head_starts_at_zero(data: Path, tmp_path: Path, lora: bool) -> None:
    run(data, tmp_path / "run", use_lora=lora)
    first = log(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["mean_reward"] == 0
    assert log(tmp_path / "run")[3]["mean_reward"] != 0


def test_lora_trains_and_saves_the_head(tmp_path: Path, data: Path) -> None:
    run(data, tmp_path / "run", use_lora=True)
    again: Any = models.load_reward_model(str(tmp_path / "run"), dtype="float32", new_head=False)[0]
    head = again.get_base_model().score
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("score" in name for name in weights)
    scores = [RewardModelScorer("rm", str(tmp_path / "run")).score(letters_or_digits(2, 3)) for _ in range(2)]
    assert scores[0] == scores[1]  # nothing of a loaded model is random


def test_lower_layers_stay_as_they_are(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, tmp_path / "run", model="tiny-rm", freeze_layers=0.5, weight_decay=0.1)
    assert "frozen: model.embed_tokens, model.layers.0\n" in capsys.readouterr().err
    before = dict(tiny.build_tiny_reward_model().named_parameters())
    after: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    for name, weight in after.named_parameters():
        frozen = name.startswith(("model.embed_tokens", "model.layers.0."))
        assert torch.equal(weight, before[name]) == frozen, name


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_that_learns_alone_reads_its_states_once(
    tmp_path: Path, data: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"freeze_layers": 1.0, "num_train_epochs": 3, "learning_rate": 0.05, "use_lora": lora}
    seen: list[Any] = []
    end_states = rewards.end_states
    monkeypatch.setattr(
        rewards, "end_states", lambda m, p, r, **more: seen.append((p, r)) or end_states(m, p, r, **more)
    )
    run(data, tmp_path / "once", **settings)
    assert len(seen) == len({str(one) for one in seen}) == len(data.read_text().splitlines())
    monkeypatch.setattr(RewardTrainer, "sharded", True)
    run(data, tmp_path / "each", **settings)
    for once, each in zip(log(tmp_path / "once"), log(tmp_path / "each"), strict=True):
        assert once.keys() == each.keys()
        for name in ("loss", "mean_reward", "ranking_accuracy", "grad_norm"):
            assert once.get(name, 0) == pytest.approx(each.get(name, 0), rel=1e-5, abs=1e-6), name
    assert log(tmp_path / "once")[-2]["loss"] < log(tmp_path / "once")[0]["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(("share", "layers", "frozen"), [(0.7, 28, 20), (0.9, 10, 9), (1.0, 3, 3), (0.1, 3, 1)])
def test_how_many_layers_freeze(share: float, layers: int, frozen: int) -> None:
    config = tiny.build_tiny_reward_model().config
    config.num_hidden_layers, config.layer_types = layers, None
    model = transformers.LlamaForSequenceClassification(config)
    names = reward_module.freeze_lower(model, share)
    assert names == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(frozen))]


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_checkpoint_is_kept_and_training_stops(
    tmp_path: Path, data: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, seen = iter([0.5, 0.9, 0.6, 0.9, 0.7, 0.8]), []
    real_read, real_evaluate = Meter.read, RewardTrainer.evaluate

    def read(self: Meter, prefix: str = "") -> dict[str, float]:
        logs = real_read(self, prefix)
        return {**logs, "eval_ranking_accuracy": next(planted)} if prefix else logs

    def evaluate(self: RewardTrainer, *args: Any, **more: Any) -> dict[str, float]:
        seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})  # type: ignore[union-attr]
        return real_evaluate(self, *args, **more)

    monkeypatch.setattr(Meter, "read", read)
    monkeypatch.setattr(RewardTrainer, "evaluate", evaluate)
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "use_lora": lora}
    more |= {"load_best_model_at_end": True, "early_stopping": 3, "eval_data": str(tmp_path / "eval.jsonl")}
    result = run(data, tmp_path / "run", num_train_epochs=5, save_total_limit=1, **more)
    assert result["steps"] == 5  # three measurements after the second without a better one
    kept: Any = models.load_reward_model(str(tmp_path / "run"), dtype="float32")[0]
    kept = {name: p for name, p in kept.named_parameters() if "original_module" not in name}
    agree = [all(torch.equal(p, weights[name]) for name, p in kept.items()) for weights in seen]
    assert agree == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "unknown loss 'dpo'"),
        ({"model": "ADAPTER"}, "is an adapter"),
        ({"loss_options": '{"margn": 1}'}, "has no option 'margn'"),
        ({"pooling": "median"}, "pools by 'median'"),
        ({"pooling": "mean", "loss": "per_token"}, "no use for a head that pools by mean"),
        ({"pooling": "mean", "use_lora": True}, "--pooling is for --method reward without --use_lora"),
        ({"pooling": "mean", "model": "tiny-rm"}, "was trained to be read by 'last_non_pad'"),
        ({"freeze_layers": 1.5}, "--freeze_layers is a share"),
        ({"freeze_layers": 0.5, "method": "rank"}, "--freeze_layers is a share"),
        ({"early_stopping": 2}, "--early_stopping needs --load_best_model_at_end"),
        ({"load_best_model_at_end": True}, "the best checkpoint by ranking_accuracy needs --eval_data"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, data: Path, change: dict[str, Any], message: str) -> None:
    if change.get("model") == "ADAPTER":
        run(data, tmp_path / "adapter", use_lora=True, max_steps=1)
        change = {"model": str(tmp_path / "adapter")}
    with pytest.raises(InputError, match=message):
        run(data, tmp_path / "run", **change)
