"""The benchmark of GPUs at toy sizes on the CPU, and the arithmetic that it divides by."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cards, gpu, results, trl
from benchmarks.data import Lists

TINY = {**gpu.TOY, "attn_implementation": "eager"}


def llama(tied: bool) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied: bool) -> None:
    """For one answer, where a plain row does nothing twice; eager attention also makes what the mask throws away."""
    model, prompt, answer = llama(tied), list(range(3, 14)), list(range(20, 27))
    with FlopCounterMode(display=False) as counted:
        inputs = torch.tensor([[*prompt, *answer[:-1]]])
        states = model.model(inputs).last_hidden_state[:, len(prompt) - 1 :]
        model.lm_head(states).sum().backward()
    tokens = inputs.shape[1]
    thrown_away = 12 * TINY["num_hidden_layers"] * TINY["hidden_size"] * (tokens * (tokens - 1) // 2)
    assert counted.get_total_flops() - cards.step_operations(model, [(prompt, [answer], [0.0])]) == thrown_away


def test_operations_of_a_list_count_its_prompt_once() -> None:
    model, prompt, answers = llama(False), [3] * 11, [[4] * 7, [5] * 2]
    apart = sum(cards.step_operations(model, [(prompt, [answer], [0.0])]) for answer in answers)
    body = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    pairs = sum(1 for query in range(11) for key in range(11) if key <= query)
    once = 6 * body * 11 + 12 * TINY["num_hidden_layers"] * TINY["hidden_size"] * pairs
    assert cards.step_operations(model, [(prompt, answers, [1.0, 0.0])]) == apart - once
    assert cards.real_tokens([(prompt, answers, [1.0, 0.0])]) == 11 + 7 + 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_peaks_are_found_by_the_whole_name(name: str, peak: float | None) -> None:
    found = cards.peak_of(name)
    assert (found and found[0]) == peak


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.models, "device", lambda: torch.device("cpu"))
    assert gpu.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_what_fails_is_a_row_and_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("broken | here")

    monkeypatch.setattr(gpu, "label_logps", broken)
    assert gpu.main(["--tiny", "--parts", "head", "--repeats", "1", "--out", str(tmp_path / "gpu.json")]) == 1
    first = json.loads((tmp_path / "gpu.json").read_text())["rows"][0]
    assert first["failed"] == "ValueError: broken | here"
    assert "seconds" not in first


def test_every_row_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(trl, "BATCHES", (1, 2))
    torch._dynamo.reset()  # a graph that another test has left would not be counted
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--shapes", "1.5b", "--repeats", "1", "--write", "--out", str(out)]) == 0
    file = json.loads(out.read_text())
    assert file["machine"]["torch"] == torch.__version__
    rows: dict[tuple[str, str], Any] = {(row["what"], row["who"]): row for row in file["rows"]}
    assert len(rows) == 3 + 6 + 4 + 2 * 2  # decoding, DPO, RRHF, two heads
    ran = [row for row in rows.values() if "skipped" not in row]
    assert all(
        row["seconds"] > 0 and row["tflops" if "head" in row["what"] else "tokens_per_second"] > 0 for row in ran
    )
    # The same work in every row: one loss, whoever computes it and however rows are laid out, but for bfloat16.
    for what, theirs in (("1.5b DPO step, 2 pairs", {"TRL padded"}), ("1.5b RRHF step, 2 lists of 3", set())):
        losses = {who: row["value"] for (of, who), row in rows.items() if of == what and "value" in row}
        assert losses.keys() == {"tree rows", "--layout padded", "tree rows, --torch_compile"} | theirs
        assert max(losses.values()) - min(losses.values()) < 1e-3 * max(losses.values())
    written = [row for row in ran if "decoding" in row["what"]]
    assert [row["value"] for row in written] == [row["tokens"] for row in written] == [12, 12]
    assert rows["1.5b DPO step, 2 pairs", "tree rows, --torch_compile"]["graphs_at_first"] > 0
    assert all(row["graphs"] == 0 for row in ran)
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("\n| ") == len(rows) + 1
    assert "TRL has no RRHF" in page
    assert "a CUDA graph needs a GPU" in page


def test_every_answer_of_rrhf_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its least operations would count some that nobody makes."""
    seen: list[Lists] = []

    def keep(model: Any, compiled: Any, lists: Lists, refs: Any, loss: str, **_: Any) -> dict[str, Any]:
        seen.append(lists if loss == "rrhf" else [])
        for (_, answers, scores), sums in zip(lists if loss == "rrhf" else [], refs, strict=False):
            means = [float(s) / len(a) for s, a in zip(sums, answers, strict=True)]
            assert sorted(range(len(means)), key=means.__getitem__) == sorted(
                range(len(means)), key=lambda n: -scores[n]
            )
        return {}

    monkeypatch.setattr(gpu, "ours", keep)
    bench = gpu.Bench(torch.device("cpu"), gpu.TINY, 1, True, lambda rows: None)
    monkeypatch.setattr(bench, "by_trl", lambda *_, **__: gpu.no_rrhf())
    bench.shape("8b", ["step"])
    assert len(seen[-1]) == gpu.TINY.lists


def test_waits_are_those_that_torch_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without a card: its functions are stand-ins, the warning's words are torch's."""
    modes: list[str] = []
    monkeypatch.setattr(cards, "is_real", lambda device: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)

    def step() -> float:
        for _ in range(3):  # from one line, of which Python would show the first alone
            warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return 2.5

    told = cards.observe(step, torch.device("cuda"))
    assert told == {"value": 2.5, "waits": 3, "peak": 7, "graphs": 0}
    assert modes == ["warn", "default"]
