"""Losses that read tokens: what they get from every layout, from two passes and from the cache; even draws."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.by_hand import HAND

from rankalign.data.encode import TokenList
from rankalign.data.records import CandidateSet, Response, write
from rankalign.losses import LOSSES
from rankalign.losses.ranked import Ranked
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.rows.logps import list_logps
from rankalign.training.arguments import parse_settings
from rankalign.training.examples import Example, to_ranked
from rankalign.training.rank import RankTrainer
from rankalign.training.reference import ReferenceCache
from rankalign.training.run import train

LISTS = [  # ragged, one response of the second list has context in it
    TokenList("a", [5, 6, 7], [[8, 9], [10, 11, 12, 13, 9], [14, 9, 9]], [1.0, 0.0, 0.5]),
    TokenList(
        "b", [7, 5], [[8, 9, 20, 21, 22, 9, 30, 31, 32, 33], [12, 9]], [0.0, 1.0], unlearned=[[(1, 3), (5, 6)], []]
    ),
]


def plain(model: Any, tokens: TokenList) -> list[torch.Tensor]:
    """Log-probs of the counted tokens of each response, one response at a time, by transformers alone."""
    rows = []
    for i, response in enumerate(tokens.responses):
        holes = {t for start, end in (tokens.unlearned[i] if tokens.unlearned else []) for t in range(start, end)}
        logits = model(torch.tensor([[*tokens.prompt, *response]])).logits[0, len(tokens.prompt) - 1 : -1]
        every = logits.log_softmax(-1)[range(len(response)), response]
        rows.append(every[[t for t in range(len(response)) if t not in holes]])
    return rows


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_tokens_of_lists_are_those_of_plain_forward_passes(layout: str) -> None:
    model = tiny.build_model().double().eval()
    prompts, responses, spans = zip(*((t.prompt, t.responses, t.unlearned) for t in LISTS), strict=True)
    found = list_logps(model, prompts, responses, layout=layout, unlearned=spans, tokens=True)
    assert found.shape == (2, 3, 7)
    for p, tokens in enumerate(LISTS):
        for n, expected in enumerate(plain(model, tokens)):
            torch.testing.assert_close(found[p, n, : len(expected)], expected, atol=1e-10, rtol=0)
            assert not found[p, n, len(expected) :].any()
    sums = list_logps(model, prompts, responses, layout=layout, unlearned=spans)
    torch.testing.assert_close(found.sum(2), sums, atol=1e-10, rtol=0)


def settings(folder: Path, **more: Any) -> Any:
    fixed = {"model": "tiny", "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True}
    return parse_settings({**fixed, "save_strategy": "no", "logging_steps": 1, **more})


@pytest.mark.parametrize("loss", ["ld_dpo", "sampo", "sft+0.5*ld_dpo"])
def test_gradients_whatever_the_rows(tmp_path: Path, loss: str) -> None:
    """Tree rows, padded rows, two passes a response at a time, and autograd through transformers' logits."""
    model, start = tiny.build_model().double(), tiny.build_model().double().eval()
    generator = torch.Generator().manual_seed(1)
    for weight in start.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    examples = []
    for tokens in LISTS:
        rows = [row.detach() for row in plain(start, tokens)]
        examples.append(Example(tokens, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)))
    found: dict[str, list[torch.Tensor]] = {}
    for layout, two_pass in (("tree", "never"), ("padded", "never"), ("tree", "always"), ("padded", "always")):
        config = settings(
            tmp_path, loss=loss, beta=0.5, two_pass=two_pass, token_budget=6 if two_pass == "always" else 4096
        )
        trainer = RankTrainer(model, config, examples, layout=layout)
        model.zero_grad()
        trainer.training_step(model, {"examples": examples}, 2)
        found[f"{layout}, {two_pass}"] = [w.grad.clone() for w in model.parameters() if w.grad is not None]
    model.zero_grad()
    rows = [[torch.nn.functional.pad(r, (0, 7 - len(r))) for r in plain(model, tokens)] for tokens in LISTS]
    rows[1].append(torch.zeros(7, dtype=torch.float64))
    ranked = to_ranked(examples, torch.stack([torch.stack(row) for row in rows]))
    config.loss_entry.function(ranked, **config.loss_keywords()).mean().backward()
    expected = [w.grad for w in model.parameters() if w.grad is not None]
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for name, gradients in found.items():
        for ours, theirs in zip(gradients, expected, strict=True):
            atol = 1e-12 if "padded" in name else 1e-7  # norms and angles of tree rows are fp32
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-9, msg=name)


def test_cache_of_tokens_gives_back_every_bit(tmp_path: Path) -> None:
    model = tiny.build_model().double().eval()

    def compute(some: Any) -> list[torch.Tensor]:
        more: dict[str, Any] = {"unlearned": [t.unlearned for t in some], "tokens": True}
        prompts, responses = [t.prompt for t in some], [t.responses for t in some]
        found = list_logps(model, prompts, responses, layout="padded", **more).detach()
        return [row[: len(t.responses)] for row, t in zip(found, some, strict=True)]

    without = replace(LISTS[1], id="c", unlearned=[])  # the same tokens, all of which count
    fewer = replace(LISTS[0], id="d", responses=LISTS[0].responses[1:], scores=[0.0, 0.5])
    lists = [*LISTS, without, fewer]
    first = ReferenceCache(tmp_path, "w" * 64, "float64-cpu", tokens=True)
    made = first.logps(lists, compute)
    assert first.computed == 3 + 2 + 1  # the short answer of the list without spans has none in the other either
    again = ReferenceCache(tmp_path, "w" * 64, "float64-cpu", tokens=True)
    kept = again.logps(lists[::-1], compute)[::-1]
    assert again.computed == 0
    for one, other, tokens in zip(made, kept, lists, strict=True):
        assert torch.equal(one, other)
        for row, expected, size in zip(one, plain(model, tokens), tokens.lengths, strict=True):
            torch.testing.assert_close(row[:size], expected, atol=1e-10, rtol=0)
            assert not row[size:].any()
    assert not ReferenceCache(tmp_path, "w" * 64, "float64-cpu").path.exists()  # sums have a file of their own


def test_a_torn_row_is_computed_again(tmp_path: Path) -> None:
    def compute(some: Any) -> list[torch.Tensor]:
        return [torch.arange(20.0).repeat(len(t.responses), 1) for t in some]

    lists = [TokenList("a", [5], [list(range(20))], [0.0])]
    ReferenceCache(tmp_path, "w" * 64, "float64-cpu", tokens=True).logps(lists, compute)
    (path,) = tmp_path.glob("*-tokens.table")
    path.write_bytes(path.read_bytes()[:-50])  # two of its three rows are whole
    cache = ReferenceCache(tmp_path, "w" * 64, "float64-cpu", tokens=True)
    assert torch.equal(cache.logps(lists, compute)[0], torch.arange(20.0, dtype=torch.float64)[None])
    assert cache.computed == 1


@pytest.mark.parametrize("loss", ["ld_dpo", "sampo"])
def test_runs_log_the_same_whenever_the_reference_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    answers = [("blue", "green and blue and green"), ("sun", "moon moon"), ("pear", "a pear or two pears")]
    sets = [
        CandidateSet(str(i), f"say {w}", [Response(w, scores={"j": 1.0}), Response(y, scores={"j": 0.0})])
        for i, (w, y) in enumerate(answers)
    ]
    write(tmp_path / "data.jsonl", sets)
    logs = []
    for i, references in enumerate(("before", "ahead", "ahead")):
        monkeypatch.setattr(models, "cache_dir", lambda i=i: tmp_path / f"cache{min(i, 1)}")  # the third finds all
        more = {"data": str(tmp_path / "data.jsonl"), "max_steps": 4, "learning_rate": 0.01, "beta": 1.0}
        train(settings(tmp_path / f"run{i}", loss=loss, references=references, **more))
        lines = [json.loads(line) for line in (tmp_path / f"run{i}" / "log.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines if "loss" in line])
    assert logs[0] == logs[1] == logs[2]
    assert logs[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert logs[0][-1] < 0.6


def test_tokens_are_drawn_evenly_and_by_prompt() -> None:
    """The longer answer has log-ratio 10^t at token t and the shorter 0, so v tells which tokens were drawn."""
    count, length, drawn = 3000, 6, 2
    powers = 10.0 ** torch.arange(length, dtype=torch.float64)
    tokens = torch.stack([powers, torch.zeros(length, dtype=torch.float64)]).expand(count, 2, length)
    ones = torch.ones(count, 2, dtype=torch.float64)
    lengths = torch.tensor([length, drawn]).expand(count, 2)
    scores = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(count, 2)
    seeds = torch.arange(count) * 2654435761 % 2**32
    ranked = Ranked(tokens.sum(2), lengths, scores, ones.bool(), 0 * ones, None, tokens, 0 * tokens, seeds)
    sums = LOSSES["sampo"].function(ranked, beta=-1.0).round()  # log(1 + e^v) is v but for e^-v, v at least 11
    places = [tuple(t for t in range(length) if int(v) // 10**t % 10) for v in sums.tolist()]
    seen = Counter(places)
    assert {len(p) for p in seen} == {drawn}
    pairs = length * (length - 1) // 2
    spread = 5 * (count / pairs) ** 0.5  # five deviations of a count
    assert len(seen) == pairs
    assert all(abs(n - count / pairs) < spread for n in seen.values())
    other = LOSSES["sampo"].function(replace(ranked, seeds=None), draw_seed=1.0)
    assert len(set(other.tolist())) == 1  # without seeds all prompts draw alike


def test_the_shorter_answer_counts_whole() -> None:
    """A pair of equal lengths is DPO's, whatever the draws."""
    equal = Ranked(
        **{name: getattr(HAND, name)[:, :2] for name in ("logps", "scores", "mask", "ref_logps")},
        lengths=torch.tensor([[4, 4]]),
        token_logps=HAND.token_logps[:, :2],
        ref_token_logps=HAND.ref_token_logps[:, :2],
    )
    for name in ("sampo", "ld_dpo"):
        ours, dpo = LOSSES[name].function(equal), LOSSES["dpo"].function(equal)
        torch.testing.assert_close(ours, dpo, atol=1e-12, rtol=0)
