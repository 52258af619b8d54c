"""Losses that read whole distributions: TDPO's KL and WPO's alignment, against autograd on transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_token_losses import LISTS, settings

from rankalign.data.encode import TokenList
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.losses.ranked import Ranked
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.rows import head as heads
from rankalign.rows.head import Head, OwnHead, head_of
from rankalign.rows.whole import Reference, divergence, log_squares
from rankalign.training.examples import Example, to_ranked
from rankalign.training.rank import RankTrainer
from rankalign.training.run import train

MOST = 7  # counted tokens of the longest response


def moved(seed: int) -> Any:
    """A tiny model whose weights were moved."""
    model, generator = tiny.build_model().double(), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model.eval()


class At:
    """A reference that is another model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def beside(self, model: Any, untouched: bool = False) -> Iterator[Any]:
        yield self.model


def log_probs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) of one response, by transformers alone."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def plainly(model: Any, start: Any, lists: list[TokenList]) -> Ranked:
    """What a loss reads, each response by itself and every logit at once."""
    width = max(len(t.responses) for t in lists)
    nothing = torch.zeros(MOST, dtype=torch.float64)
    rows = {name: [[nothing] * width for _ in lists] for name in ("p", "r", "sq", "kl")}
    for i, tokens in enumerate(lists):
        for n, response in enumerate(tokens.responses):
            holes = {t for a, b in (tokens.unlearned[n] if tokens.unlearned else []) for t in range(a, b)}
            counted = torch.tensor([t not in holes for t in range(len(response))])
            policy, reference = (log_probs(m, tokens.prompt, response) for m in (model, start))
            reference, own = reference.detach(), range(len(response))
            found = {
                "p": policy[own, response],
                "r": reference[own, response],
                "sq": (policy.exp() ** 2).sum(1).log().detach(),
                "kl": (reference.exp() * (reference - policy)).sum(1),
            }
            for name, values in found.items():
                rows[name][i][n] = torch.nn.functional.pad(values[counted], (0, MOST - int(counted.sum())))
    p, r, sq, kl = (torch.stack([torch.stack(row) for row in rows[name]]) for name in ("p", "r", "sq", "kl"))
    ranked = to_ranked([Example(t) for t in lists], p.sum(2))
    whole = {"ref_logps": r.sum(2), "log_squares": sq.sum(2), "ref_kls": kl.sum(2)}
    return replace(ranked, token_logps=p, ref_token_logps=r, **whole)


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2", "wpo_aligned", "ld_dpo+0.5*tdpo2+wpo_aligned"])
def test_values_and_gradients_whatever_the_rows(tmp_path: Path, loss: str) -> None:
    model, start = tiny.build_model().double(), moved(1)
    ranked = plainly(model, start, LISTS)
    refs = ranked.ref_token_logps if "ld_dpo" in loss else ranked.ref_logps
    cut = [row[: len(t.responses)] for t, row in zip(LISTS, refs, strict=True)]
    cut = [row[:, : max(t.lengths)] if row.dim() == 2 else row for t, row in zip(LISTS, cut, strict=True)]
    sums = [Example(t, row) for t, row in zip(LISTS, cut, strict=True)]
    config = settings(tmp_path, loss=loss, beta=0.5)
    losses = config.loss_entry.function(ranked, **config.loss_keywords())
    losses.mean().backward()
    expected = [w.grad.clone() for w in model.parameters() if w.grad is not None]
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for layout, two_pass in (("tree", "never"), ("padded", "never"), ("tree", "always"), ("padded", "always")):
        budget = 6 if two_pass == "always" else 4096
        config = settings(tmp_path, loss=loss, beta=0.5, two_pass=two_pass, token_budget=budget)
        trainer = RankTrainer(model, config, sums, layout=layout)
        trainer.start = At(start)
        model.zero_grad()
        found = trainer.training_step(model, {"examples": sums}, 2)
        atol = 1e-10 if layout == "padded" else 1e-6  # norms and angles of tree rows are fp32
        torch.testing.assert_close(found.double(), losses.mean().detach(), atol=atol, rtol=0)
        for weight, theirs in zip([w for w in model.parameters() if w.grad is not None], expected, strict=True):
            torch.testing.assert_close(weight.grad, theirs, atol=atol, rtol=1e-9, msg=f"{layout}, {two_pass}")


@pytest.mark.parametrize("kind", ["plain", "bias, scale and cap", "own", "half"])
def test_tiles_give_what_whole_logits_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 7 of 50 entries and chunks of 3 of 11 positions."""
    monkeypatch.setattr(heads, "TILE", 7)
    monkeypatch.setattr("rankalign.rows.whole.CHUNK", 3)
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "half" else torch.float64
    hidden, theirs = (torch.randn(11, 8, dtype=dtype) for _ in range(2))
    weights = [torch.nn.Parameter(torch.randn(50, 8, dtype=dtype)) for _ in range(2)]
    bias = torch.nn.Parameter(torch.randn(50, dtype=dtype)) if "bias" in kind else None
    hidden.requires_grad_()
    scale, cap = (0.7, 4.0) if "cap" in kind else (1.0, None)
    ours, other = Head(weights[0], bias, scale, cap), Head(weights[1], bias, scale, cap)

    def logits(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = scale * (states @ weight.t() + (0 if bias is None else bias))
        return z if cap is None else cap * torch.tanh(z / cap)

    log_p, log_r = logits(hidden, weights[0]).log_softmax(1), logits(theirs, weights[1]).log_softmax(1).detach()
    expected = (log_r.exp() * (log_r - log_p)).sum(1)
    if kind == "own":
        monkeypatch.setattr("rankalign.rows.whole.own_logits", lambda weight, states: logits(states, weight))
        ours, other = OwnHead(weights[0], weights[0]), OwnHead(weights[1], weights[1])
    found = divergence(ours, hidden, Reference(other, theirs))
    slopes = torch.randn(11, dtype=dtype)
    leaves = [hidden, weights[0], *([bias] if bias is not None else [])]
    tolerance: dict[str, Any] = {"atol": 1e-4 if kind == "half" else 1e-12, "rtol": 1e-4 if kind == "half" else 1e-11}
    torch.testing.assert_close(found, expected, **tolerance)
    for mine, right in zip(
        torch.autograd.grad((found * slopes).sum(), leaves),
        torch.autograd.grad((expected * slopes).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, **tolerance)
    squares = log_squares(ours, hidden)
    assert not squares.requires_grad
    torch.testing.assert_close(squares, (log_p.exp() ** 2).sum(1).log().detach(), **tolerance)
    same = divergence(ours, hidden, Reference(ours, hidden.detach()))
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-6 if kind == "half" else 1e-14, rtol=0)


def test_no_more_than_a_tile_of_logits_lives() -> None:
    """40,000 entries at 256 positions would be 41 MB of logits; a tile of 4,096 is 4 MB, and five of them live."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if hasattr(t, "numel"))
            return out

    hidden, weight = torch.randn(256, 4, requires_grad=True), torch.nn.Parameter(torch.randn(40_000, 4))
    head, theirs = Head(weight), torch.randn(256, 4)
    with Watch():
        divergence(head, hidden, Reference(Head(weight.detach() + 1), theirs)).sum().backward()
        log_squares(head, hidden)
    assert max(sizes) <= max(256 * heads.TILE, weight.numel())


def test_a_run_starts_at_ln_2_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all weights and with an adapter, references ahead or before: the same first losses, KLs above 0 later."""
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")
    answers = [("blue", "green and blue and green"), ("sun", "moon moon"), ("pear", "a pear or two pears")]
    sets = [
        CandidateSet(str(i), f"say {w}", [Response(w, scores={"j": 1.0}), Response(y, scores={"j": 0.0})])
        for i, (w, y) in enumerate(answers)
    ]
    write(tmp_path / "data.jsonl", sets)
    logs: dict[str, list[float]] = {}
    for name, more in {
        "ahead": {"references": "ahead"},
        "before": {"references": "before"},
        "lora": {"use_lora": True, "references": "ahead"},
        "dpo": {"loss": "dpo"},
    }.items():
        fixed = {"data": str(tmp_path / "data.jsonl"), "max_steps": 4, "learning_rate": 0.01, "beta": 1.0}
        train(settings(tmp_path / name, **{"loss": "tdpo1", **fixed, **more}))
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs[name] = [line["loss"] for line in lines if "loss" in line]
        assert logs[name][0] == pytest.approx(0.693147, abs=1e-5)
    assert logs["ahead"] == logs["before"]
    assert logs["ahead"][2] != pytest.approx(logs["dpo"][2], rel=0.05)  # the KL is not 0 any more
    assert logs["lora"][-1] < 0.69


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'tdpo2' runs the reference beside the policy"):
        settings(tmp_path, loss="tdpo2", fsdp="full_shard")
    assert LOSSES["tdpo2"].needs_kls
    assert isinstance(head_of(tiny.build_model()), Head)
