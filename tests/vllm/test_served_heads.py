"""ArmoRM's, QRM's and GRM's heads on a trunk behind a real ``vllm serve``, beside plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("vllm.version", reason="vllm is not installed here; make test-vllm has an environment of its own")

from transformers import AutoModel, AutoTokenizer

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError
from rankalign.scorers.reward_server import RewardServerScorer
from tests.unit.models.made_heads import CASES, SETS, gated_by_hand, grm_by_hand, save_gated, save_grm
from tests.vllm.small import served

NAMES = (*CASES, "GRM")
LAYERS = 2
# Behind SETS one that fills several blocks of the server's cache.
MORE = [*SETS, CandidateSet("c", "Count.", [Response("one two three four five six seven " * 9, "m")])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all reward models, and under ``trunk`` those alone, all the same, made as the docs say."""
    root = tmp_path_factory.mktemp("heads")
    for case in CASES:
        save_gated(root / case, case, hidden=64, heads=2)  # vLLM's kernels for CPUs want attention heads of 32
    save_grm(root / "GRM", LAYERS, hidden=64, heads=2)
    for name in NAMES:
        AutoModel.from_pretrained(root / name, dtype="auto").save_pretrained(root / "trunk" / name)
        AutoTokenizer.from_pretrained(root / name).save_pretrained(root / "trunk" / name)
    first, *others = [load_file(root / "trunk" / name / "model.safetensors") for name in NAMES]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    return root


@pytest.fixture(scope="module", params=["token_embed", "embed"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, str]]:
    """A form, and where a server for it takes posts."""
    words = ["--runner", "pooling", "--max-model-len", "512", "--pooler-config.task", request.param]
    with served(str(folder / "trunk" / "ArmoRM"), folder / f"{request.param}.log", *words) as address:
        yield request.param, f"{address}/pooling"


def by_hand(folder: Path, name: str, kind: torch.dtype = torch.float32, output: int | None = None) -> list[float]:
    """Plain transformers on the templated conversations."""
    if name == "GRM":
        return grm_by_hand(folder / name, LAYERS, kind, MORE)
    rewards, objectives = gated_by_hand(folder / name, name, kind, MORE)
    return rewards if output is None else [float(row[output]) for row in objectives]


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_those_of_plain_transformers(server: tuple[str, str], folder: Path, name: str) -> None:
    form, url = server
    scorer = RewardServerScorer("rm", url, form, "it", head=str(folder / name))
    found = [score for row in scorer.score(MORE) for score in row]
    assert found == pytest.approx(by_hand(folder, name), abs=1e-6)
    truth = by_hand(folder, name, torch.float64)
    assert found == pytest.approx(truth, abs=1e-6)
    assert len({round(score, 3) for score in truth}) == 5  # the bounds above mean something


def test_the_command_scores_by_an_objective(server: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    form, url = server
    write(tmp_path / "in.jsonl", MORE)
    told = {"name": "rm", "kind": "reward_server", "url": url, "form": form, "model": "it"}
    told |= {"head": str(folder / "ArmoRM"), "axis": "helpsteer-verbosity"}
    files = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    (tmp_path / "score.yaml").write_text(yaml.safe_dump({**files, "scorers": [told]}))
    assert main(["score", "--config", str(tmp_path / "score.yaml")]) == 0
    found = [r.scores["rm"] for record in read(tmp_path / "out.jsonl") for r in record.responses]
    assert found == pytest.approx(by_hand(folder, "ArmoRM", output=4), abs=1e-6)


def test_what_the_server_is_not_asked_for_is_refused(server: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    form, url = server
    head = str(folder / "ArmoRM")
    with pytest.raises(InputError, match=r"vectors of length 1: it normalises"):
        RewardServerScorer("rm", url, form, "it", head=head, extra_body={"use_activation": True}).score(SETS)
    other = "embed" if form == "token_embed" else "token_embed"
    with pytest.raises(InputError, match=rf"the server refuses: 400 .*--pooler-config.task {other}"):
        RewardServerScorer("rm", url, other, "it", head=head).score(SETS)
    long = CandidateSet("a", "Hi", [Response("word " * 600, "m")])
    with pytest.raises(InputError, match=r"the server refuses: 400 .*512"):
        RewardServerScorer("rm", url, form, "it", head=head).score([long])
    save_grm(tmp_path / "wider", LAYERS, hidden=96, heads=3)
    with pytest.raises(InputError, match="64 each, and the head reads 96"):
        RewardServerScorer("rm", url, form, "it", head=str(tmp_path / "wider")).score(SETS)
