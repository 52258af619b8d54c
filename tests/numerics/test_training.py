"""The trainer against arithmetic written out apart from it: masks, means over prompts, accumulation, logs, resume."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.data.encode import EncodeOptions, TokenList, encode_all
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError, Interrupted
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.models.merge import merge_lora
from rankalign.training import reference
from rankalign.training.arguments import TrainConfig, parse_settings
from rankalign.training.examples import Example, to_ranked
from rankalign.training.rank import RankTrainer
from rankalign.training.reference import ReferenceCache
from rankalign.training.run import train

TOKENIZER = tiny.build_tokenizer()


def toy_sets(count: int, seed: int = 0) -> list[CandidateSet]:
    rng = random.Random(seed)
    sets = []
    for i in range(count):
        texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 12))) for _ in range(rng.randint(2, 5))]
        responses = [
            Response(text, finished=rng.random() < 0.8, scores={"toy": float(rng.randint(0, 4))}) for text in texts
        ]
        sets.append(CandidateSet(f"p{i}", "prompt " + "x" * rng.randint(0, 9), responses))
    return sets


def toy_lists(count: int, seed: int = 0) -> list[TokenList]:
    return encode_all(toy_sets(count, seed), TOKENIZER, EncodeOptions(judge="toy"))[0]


def one_by_one(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Sum of log-probabilities of one response, from the model's own logits, with no batch, mask or padding."""
    ids = torch.tensor([prompt + response])
    logps = model(ids).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))  # type: ignore[return-value]


def settings(tmp_path: Path, **more: Any) -> TrainConfig:
    fixed = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    fixed |= {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    return parse_settings({**fixed, **more})


def trained(tmp_path: Path, examples: list[Example], **more: Any) -> tuple[RankTrainer, dict[str, torch.Tensor]]:
    model = tiny.build_model().double()
    trainer = RankTrainer(model, settings(tmp_path, **more), examples)
    trainer.train()
    return trainer, {name: p.detach().clone() for name, p in model.named_parameters()}


def rrhf_by_hand(values: list[torch.Tensor], lengths: list[int], scores: list[float]) -> torch.Tensor:
    """RRHF, section 3.1 of arXiv:2304.05302, in plain loops."""
    p = [value / length for value, length in zip(values, lengths, strict=True)]
    rank = sum(torch.relu(p[i] - p[j]) for i in range(len(p)) for j in range(len(p)) if scores[i] < scores[j])
    best = max(range(len(scores)), key=lambda i: scores[i])
    return rank - values[best]


def test_loss_is_the_papers_over_a_ragged_batch(tmp_path: Path) -> None:
    lists = toy_lists(3)
    model = tiny.build_model().double()
    trainer = RankTrainer(model, settings(tmp_path), [Example(t) for t in lists])
    loss = trainer.compute_loss(model, {"examples": [Example(t) for t in lists]})
    by_hand = [
        rrhf_by_hand([one_by_one(model, t.prompt, r) for r in t.responses], [len(r) for r in t.responses], t.scores)
        for t in lists
    ]
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-9)


def test_sft_counts_response_tokens_alone(tmp_path: Path) -> None:
    tokens = toy_lists(1)[0]
    model = tiny.build_model().double()
    trainer = RankTrainer(model, settings(tmp_path, method="sft"), [Example(tokens)])
    best = max(range(len(tokens.scores)), key=lambda i: tokens.scores[i])
    response = tokens.responses[best]
    ids = torch.tensor([tokens.prompt + response])
    labels = torch.tensor([-100] * len(tokens.prompt) + response)
    with torch.no_grad():
        by_hand = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[1:])  # a mean over labels
    assert trainer.compute_loss(model, {"examples": [Example(tokens)]}).item() == pytest.approx(
        by_hand.item(), abs=1e-9
    )


@pytest.mark.parametrize("loss", ["rrhf", "dpo", "sft"])
def test_accumulation_and_batches_do_not_change_the_step(tmp_path: Path, loss: str) -> None:
    examples = [Example(t, torch.randn(len(t.responses), dtype=torch.float64)) for t in toy_lists(8)]
    start = dict(tiny.build_model().double().named_parameters())
    results = {}
    for batch, accumulation in ((8, 1), (1, 8), (2, 4), (3, 3)):  # 3 x 3 leaves a micro-batch of two
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        where = tmp_path / f"{batch}"
        results[batch] = trained(where, examples, loss=loss, learning_rate=0.1, num_train_epochs=1, **sizes)[1]
    for name, whole in results[8].items():
        for batch in (1, 2, 3):
            torch.testing.assert_close(results[batch][name], whole, rtol=1e-9, atol=1e-12)
        assert name.endswith("norm.weight") or not torch.equal(whole, start[name])


@pytest.mark.parametrize(("layout", "budget"), [("tree", 45), ("padded", 120)])
@pytest.mark.parametrize("loss", ["rrhf", "dpo"])
def test_the_token_budget_does_not_change_the_step(
    tmp_path: Path, loss: str, layout: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example(t, torch.randn(len(t.responses), dtype=torch.float64)) for t in toy_lists(6)]
    passes: list[str] = []
    for name, label in (("_two_pass_step", "two"), ("compute_loss", "one")):
        real = getattr(RankTrainer, name)
        monkeypatch.setattr(
            RankTrainer, name, lambda *a, real=real, label=label, **kw: passes.append(label) or real(*a, **kw)
        )
    results, used = [], []
    for size, two_pass in ((10_000, "auto"), (budget, "auto"), (budget, "never"), (budget, "always"), (1, "auto")):
        passes.clear()
        model = tiny.build_model().double()
        flags: dict[str, Any] = {"loss": loss, "token_budget": size, "two_pass": two_pass, "learning_rate": 0.1}
        flags |= {"num_train_epochs": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
        trainer = RankTrainer(model, settings(tmp_path, **flags), examples, layout=layout)
        trainer.train()
        used.append(dict(Counter(passes)))
        results.append((dict(model.named_parameters()), trainer.state.log_history[0]))
    assert used[0] == {"one": 1}
    assert set(used[1]) == {"one", "two"}
    assert used[2]["one"] > 1
    assert "two" not in used[2]
    assert used[4] == {"two": 6}
    assert set(used[3]) == {"two"}
    whole, log = results[0]
    for parameters, other in results[1:]:
        assert other == pytest.approx(log, rel=1e-9)
        for name, value in whole.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-7, atol=1e-9)  # norms run in float32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"two_pass": "yes"}, "unknown --two_pass"),
        ({"two_pass": "always", "method": "reward"}, "two_pass always"),
        ({"two_pass": "always", "use_lora": True, "lora_dropout": 0.1}, "two_pass always"),
        ({"token_budget": 0}, "token_budget"),
    ],
)
def test_two_pass_flags_are_checked(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(tmp_path, **flags)


def test_the_step_is_the_gradient_of_the_mean_over_prompts(tmp_path: Path) -> None:
    lists = toy_lists(4, seed=3)
    model = tiny.build_model().double()
    by_hand = [
        rrhf_by_hand([one_by_one(model, t.prompt, r) for r in t.responses], [len(r) for r in t.responses], t.scores)
        for t in lists
    ]
    torch.stack(by_hand).mean().backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in model.named_parameters()}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, after = trained(tmp_path, [Example(t) for t in lists], learning_rate=0.5, num_train_epochs=1, **sizes)
    for name, value in expected.items():
        # Llama's norms run in float32 even in a float64 model, so padding moves the eighth digit.
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-8)


def test_log_parts_add_up(tmp_path: Path) -> None:
    examples = [Example(t) for t in toy_lists(6, seed=1)]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_train_epochs": 2}
    trainer, _ = trained(tmp_path, examples, rrhf_weight=3.0, learning_rate=0.01, logging_steps=2, **sizes)
    lines = [line for line in trainer.state.log_history if "rank_loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert 3.0 * line["rank_loss"] + line["sft_loss"] == pytest.approx(line["loss"], abs=1e-9)
        assert 0 <= line["ranking_accuracy"] <= 1


def test_accuracy_counts_strict_pairs_by_mean_log_probability() -> None:
    from rankalign.training.meter import Meter

    tokens = TokenList("p", [1], [[5, 6], [7], [8, 9, 10], [11]], [3.0, 2.0, 2.0, 1.0])
    logps = torch.tensor([[-2.0, -0.5, -9.0, -4.0]], dtype=torch.float64)
    meter = Meter()
    ranked = to_ranked([Example(tokens)], logps)
    meter.add(ranked, torch.zeros(1), {})
    # p = -1, -.5, -3, -4; right: (0,2) (0,3) (1,3) (2,3); wrong: (0,1); tied: (1,2)
    logs = meter.read()
    assert (logs["pairs"], logs["tied_pairs"]) == (5, 1)
    assert logs["ranking_accuracy"] == pytest.approx(4 / 5)
    assert logs["margin"] == pytest.approx((2 + 3 + 3.5 + 1 - 0.5) / 5)


def test_a_loss_that_is_not_finite_stops_with_the_prompt(tmp_path: Path) -> None:
    tokens = toy_lists(1)[0]
    model = tiny.build_model().double()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    trainer = RankTrainer(model, settings(tmp_path), [Example(tokens)])
    with pytest.raises(InputError, match="not finite for prompts p0"):
        trainer.compute_loss(model, {"examples": [Example(tokens)]})


# --- reference log-probabilities ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "fine"), [(1.0, True), (3.0, False)])
def test_stored_sums_in_16_bits_may_be_off_by_rounding_alone(off: float, fine: bool, tmp_path: Path) -> None:
    """A hundred tokens of 3 nats each lose 0.7 at worst; a hundredth of their sum would be 3."""
    tokens = [TokenList("p", [1, 2], [list(range(100))], [0.0])]
    ReferenceCache(tmp_path, "w" * 64, "bf16-cuda").logps(tokens, lambda some: [torch.tensor([-300.0])])
    again = ReferenceCache(tmp_path, "w" * 64, "bf16-cuda")
    with nullcontext() if fine else pytest.raises(InputError, match="delete the file"):
        again.logps(tokens, lambda some: [torch.tensor([-300.0 - off])])
    tight = ReferenceCache(tmp_path, "v" * 64, "float32-cpu")
    tight.logps(tokens, lambda some: [torch.tensor([-300.0])])
    with pytest.raises(InputError, match="delete the file"):
        ReferenceCache(tmp_path, "v" * 64, "float32-cpu").logps(tokens, lambda some: [torch.tensor([-300.0 - off])])


def test_reference_cache_computes_once_and_equals_on_the_fly(tmp_path: Path) -> None:
    lists = toy_lists(5)
    model = tiny.build_model().double()

    def compute(some: Any) -> list[torch.Tensor]:
        return [torch.stack([one_by_one(model, t.prompt, r).detach() for r in t.responses]) for t in some]

    direct = compute(lists)
    first = ReferenceCache(tmp_path, "w" * 64, "float64-cpu")
    assert all(torch.equal(a, b) for a, b in zip(first.logps(lists, compute), direct, strict=True))
    assert first.computed == sum(len(t.responses) for t in lists)
    again = ReferenceCache(tmp_path, "w" * 64, "float64-cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.logps(lists[::-1], compute), direct[::-1], strict=True))
    assert again.computed == 0
    other = ReferenceCache(tmp_path, "v" * 64, "float64-cpu")
    other.logps(lists[:2], compute)
    assert other.computed == sum(len(t.responses) for t in lists[:2])


def test_a_sweep_computes_the_reference_once(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")
    responses = sum(len(record.responses) for record in read(data))
    for i, more in enumerate(({"learning_rate": 1e-4}, {"beta": 0.3}, {"num_train_epochs": 2})):
        train(run_settings(data, tmp_path / f"run{i}", loss="dpo", **more))
        computed = responses if i == 0 else 0
        assert f"reference: {computed} responses computed" in capsys.readouterr().err


def test_reference_cache_stores_as_it_goes(tmp_path: Path) -> None:
    lists = toy_lists(5)
    calls: list[int] = []

    def compute(some: Any) -> list[torch.Tensor]:
        calls.append(len(some))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [torch.full((len(t.responses),), -5.0) for t in some]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "STORED_AT_ONCE", 2)
        with pytest.raises(KeyboardInterrupt):
            ReferenceCache(tmp_path, "w" * 64, "float64-cpu").logps(lists, compute)
    again = ReferenceCache(tmp_path, "w" * 64, "float64-cpu")
    again.logps(lists, compute)
    assert again.computed == len(lists[4].responses)


def test_reference_cache_notices_foreign_values(tmp_path: Path) -> None:
    lists = toy_lists(2)
    cache = ReferenceCache(tmp_path, "w" * 64, "float64-cpu")
    cache.logps(lists, lambda some: [torch.full((len(t.responses),), -5.0) for t in some])
    again = ReferenceCache(tmp_path, "w" * 64, "float64-cpu")
    with pytest.raises(InputError, match="stored reference log-probability"):
        again.logps(lists, lambda some: [torch.full((len(t.responses),), -6.0) for t in some])


def test_boundary_is_part_of_the_content() -> None:
    from rankalign.training.reference import content_key

    assert content_key([1, 2], [3]) != content_key([1], [2, 3])


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data.jsonl", toy_sets(10))
    return tmp_path / "data.jsonl"


def run_settings(source: Path, output: Path, **more: Any) -> TrainConfig:
    fixed = {"model": "tiny", "data": str(source), "output_dir": str(output), "use_cpu": True, "disable_tqdm": True}
    fixed |= {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    fixed |= {"learning_rate": 1e-3, "save_steps": 2}
    return parse_settings({**fixed, **more})


def made_slower(checkpoint: Path) -> dict[str, Any]:
    """Let the checkpoint say that a thousand hours went before it; what it carries."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["rankalign_tally"]["seconds"] += 3.6e6
    path.write_text(json.dumps(state))
    return dict(state["stateful_callbacks"]["rankalign_tally"])


@pytest.mark.parametrize("more", [{}, {"loss": "dpo", "use_lora": True}], ids=["rrhf-full", "dpo-lora"])
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, data: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from rankalign.training import run as run_module

    train(run_settings(data, tmp_path / "whole", **more))
    real = run_module.JsonlLog.on_log

    def interrupting(self: Any, args: Any, state: Any, control: Any, **kw: Any) -> None:
        real(self, args, state, control, **kw)
        if state.global_step == 4:  # in the middle of the second epoch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_module.JsonlLog, "on_log", interrupting)
    with pytest.raises(Interrupted, match="stopped at step"):
        train(run_settings(data, tmp_path / "cut", **more))
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "manifest.json").exists()
    before = made_slower(tmp_path / "cut" / "checkpoint-5")
    train(run_settings(data, tmp_path / "cut", **more))
    whole, cut = (models.weights_fingerprint(str(tmp_path / name)) for name in ("whole", "cut"))
    assert whole == cut
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "cut")
    ]
    assert logs[0][:-1] == logs[1][:-1]  # the last line holds wall times
    losses = [line["loss"] for line in logs[0][:-1]]  # one line an update
    told = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "cut")]
    for run in told:
        assert run["steps"] == len(losses)
        assert run["metrics"]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert before["updates"] == 5
    assert before["loss"] == pytest.approx(sum(losses[:5]), rel=1e-6)
    assert told[1]["seconds"] > before["seconds"]  # this process alone began after it
    assert told[1]["metrics"]["train_runtime"] > before["seconds"]


def test_second_run_does_nothing_and_other_settings_are_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(run_settings(data, tmp_path / "run", num_train_epochs=1))
    stamp = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert not first["already_finished"]
    assert train(run_settings(data, tmp_path / "run", num_train_epochs=1))["already_finished"]
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"other settings \(learning_rate: 0\.001 -> 0\.002\)"):
        train(run_settings(data, tmp_path / "run", num_train_epochs=1, learning_rate=2e-3))


def test_the_saved_model_is_plain_transformers(tmp_path: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(run_settings(data, tmp_path / "run", num_train_epochs=1))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not torch.equal(loaded.lm_head.weight, tiny.build_model().lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("ab")["input_ids"] == TOKENIZER("ab")["input_ids"]


def test_sft_on_unscored_single_answers(tmp_path: Path) -> None:
    sets = [CandidateSet(f"p{i}", "say", [Response("yes")]) for i in range(4)]
    write(tmp_path / "sft.jsonl", sets)
    result = train(run_settings(tmp_path / "sft.jsonl", tmp_path / "run", method="sft", num_train_epochs=1))
    assert result["counts"]["candidates"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"judge": "nobody"}, "no response has a score by judge 'nobody'"),
        ({"eval_strategy": "epoch"}, "--eval_strategy needs --eval_data"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, data: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(run_settings(data, tmp_path / "run", **change))


def test_nothing_to_rank_is_an_error(tmp_path: Path) -> None:
    tied = [CandidateSet("p", "say", [Response(t, scores={"j": 1.0}) for t in "ab"])]
    write(tmp_path / "tied.jsonl", tied)
    with pytest.raises(InputError, match="no two responses of a prompt differ in score"):
        train(run_settings(tmp_path / "tied.jsonl", tmp_path / "run"))


def test_evaluation_while_training_is_a_mean_over_all_prompts(tmp_path: Path, data: Path) -> None:
    held_out = toy_sets(5, seed=9)
    write(tmp_path / "eval.jsonl", held_out)
    more = {"eval_data": str(tmp_path / "eval.jsonl"), "eval_strategy": "epoch", "num_train_epochs": 1}
    train(run_settings(data, tmp_path / "run", per_device_eval_batch_size=2, **more))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "eval_loss" in line)
    model = models.load_policy(str(tmp_path / "run")).double()
    lists = toy_lists(5, seed=9)
    by_hand = [
        rrhf_by_hand([one_by_one(model, t.prompt, r) for r in t.responses], [len(r) for r in t.responses], t.scores)
        for t in lists
    ]
    assert found["eval_loss"] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)


def letters_or_digits(count: int, seed: int) -> list[CandidateSet]:
    """Random strings of letters and digits, scored by their share of letters."""
    rng = random.Random(seed)
    sets = []
    for i in range(count):
        texts = ["".join(rng.choices("abcdefgh12345678", k=10)) for _ in range(5)]
        responses = [Response(text, scores={"letters": sum(map(str.isalpha, text)) / 10}) for text in texts]
        sets.append(CandidateSet(f"p{i}", f"string {i} please", responses))
    return sets


def test_policy_ranks_held_out_pairs_better_after_training(tmp_path: Path) -> None:
    """Row 32: p_i as a reward model on prompts nothing was trained on; at random weights it is a coin."""
    from rankalign.evaluation.raters.accuracy import add_policy_scores, evaluate_agreement

    write(tmp_path / "train.jsonl", letters_or_digits(32, seed=1))
    more = {"learning_rate": 1e-2, "num_train_epochs": 3, "save_strategy": "no"}
    train(run_settings(tmp_path / "train.jsonl", tmp_path / "run", **more))
    accuracy = []
    for name in ("tiny", str(tmp_path / "run")):
        held_out = letters_or_digits(24, seed=2)
        add_policy_scores(models.load_policy(name), TOKENIZER, held_out, "p")
        accuracy.append(evaluate_agreement(held_out, "p", "letters"))
    before, after = accuracy
    assert before.ci95["accuracy"][0] < 0.5 < before.ci95["accuracy"][1]
    assert after.ci95["accuracy"][0] > max(0.5, before.metrics["accuracy"])


def test_bf16_follows_float32(tmp_path: Path, data: Path) -> None:
    """Row 58: autocast to bfloat16 ends near the float32 run, and is not the same run."""
    final = {}
    for name in ("float32", "bf16"):
        more = {"bf16": name == "bf16", "learning_rate": 5e-3, "num_train_epochs": 4, "save_strategy": "no"}
        train(run_settings(data, tmp_path / name, **more))
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "rank_loss" in line]
        assert sum(losses[-3:]) < sum(losses[:3])  # three updates an epoch
        final[name] = sum(losses[-3:])
    assert final["bf16"] == pytest.approx(final["float32"], rel=0.02)
    assert final["bf16"] != final["float32"]


def test_lora_leaves_the_base_alone_and_comes_back(tmp_path: Path, data: Path) -> None:
    more = {"use_lora": True, "learning_rate": 1e-2, "save_strategy": "no"}
    train(run_settings(data, tmp_path / "run", **more))
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    assert adapter.stat().st_size > 4096
    adapted = models.load_policy(str(tmp_path / "run"))
    ids = torch.tensor([[1, 50, 60, 70]])
    base = tiny.build_model()(ids).logits
    assert (adapted(ids).logits - base).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, models.load_policy("tiny")(ids).logits)
    merge_lora(str(tmp_path / "run"), str(tmp_path / "merged"))
    merged = models.load_policy(str(tmp_path / "merged"))
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
