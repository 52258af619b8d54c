"""A loss, a format, an engine and a scorer of the user's, from files: what they are held to; runs know their source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rankalign
from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.losses.own import own_loss
from rankalign.losses.ranked import Ranked
from rankalign.storage.jsonl import write_rows
from rankalign.training.arguments import parse
from rankalign.training.settings import LossSettings

# DPO (Rafailov et al. 2023, eq. 7) over the strict pairs of a list, written out anew.
MINE = '''
import torch


def mine(ranked, beta=0.1):
    """DPO by hand."""
    gain = torch.where(ranked.mask, ranked.logps - ranked.ref_logps, 0)
    gaps = beta * (gain.unsqueeze(2) - gain.unsqueeze(1))
    pairs = ranked.pairs
    losses = torch.where(pairs, torch.nn.functional.softplus(-gaps), 0)
    return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def best(ranked):
    best = ranked.best.unsqueeze(1)
    return -(ranked.logps.gather(1, best) / ranked.lengths.gather(1, best)).squeeze(1)


def tokens(ranked):
    first = ranked.token_logps[:, :, 0] - ranked.ref_token_logps[:, :, 0]
    return -torch.where(ranked.mask, first * ranked.scores, 0).sum(1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANKALIGN_TOKEN_CACHE", str(tmp_path / "tokens"))
    (tmp_path / "my_losses.py").write_text(MINE)
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}"} for i in range(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    return tmp_path


def loss(name: str, **options: float) -> LossSettings:
    return LossSettings(loss=name, loss_options=json.dumps(options))


def test_what_a_function_reads_is_found(folder: Path) -> None:
    told = [loss(f"my_losses.py:{name}").entry for name in ("mine", "best", "tokens")]
    found = [(entry.needs_reference, entry.needs_tokens, entry.alone) for entry in told]
    assert found == [(True, False, False), (False, False, True), (True, True, False)]
    assert told[0].summary == "DPO by hand."
    assert told[0].defaults["beta"] == 0.1
    assert loss("my_losses.py:mine", beta=0.5).keywords() == {"beta": 0.5}
    with pytest.raises(InputError, match="has no option 'bta'"):
        loss("my_losses.py:mine", bta=0.5).keywords()


def test_it_is_the_loss_that_was_written(folder: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = 5, 4
    ranked = Ranked(
        -20 * torch.rand(shape, generator=generator),
        torch.randint(3, 9, shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.ones(shape, dtype=torch.bool),
        -20 * torch.rand(shape, generator=generator),
    )
    mine, dpo = loss("my_losses.py:mine").entry.function, LOSSES["dpo"].function
    assert torch.allclose(mine(ranked, beta=0.3), dpo(ranked, beta=0.3), rtol=1e-6)
    mixed = loss("0.5*my_losses.py:mine+2*sft")
    expected = 0.5 * dpo(ranked, beta=0.1) + 2 * LOSSES["sft"].function(ranked)
    assert torch.allclose(mixed.entry.function(ranked), expected, rtol=1e-6)
    assert set(mixed.entry.parts(ranked)) == {"mine", "sft"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return ranked.logps", r"must return one number a prompt, a tensor \(2,\), not shape \(2, 3\)"),
        ("return ranked.logps.sum()", r"not shape \(\)"),
        ("return 3.0", "not a float"),
        ("return ranked.scores.sum(1)", "has no gradient"),
        ("return ranked.logps.detach().sum(1)", "has no gradient"),
        ("return ranked.logps.sum(1) / 0", "is not finite"),
        ("return ranked.logps.sum(1) + ranked.ref_logps.sum(1)", "behind Ranked.mask"),
        ("return ranked.lgps", r"raised AttributeError: .*\(bad.py, line 2\)"),
    ],
)
def test_what_would_train_on_nonsense_is_refused(body: str, message: str, folder: Path) -> None:
    (folder / "bad.py").write_text(f"def bad(ranked):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        loss("bad.py:bad")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_losses.py:mne", "has no 'mne' .did you mean 'mine'"),
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("my_losses.py:mine+my_losses.py:mine", "twice"),
        ("my_losses.py:", "is not a loss with a weight"),
    ],
)
def test_names_that_name_nothing(name: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        loss(name)
    with pytest.raises(InputError, match="is for --method rank"):
        LossSettings(method="reward", loss="my_losses.py:mine")
    with pytest.raises(InputError, match="'margin' has no default"):
        own_loss(lambda ranked, margin: ranked.logps.sum(1), "f")


TRAIN = ["train", "--model", "tiny", "--data", "pairs.jsonl", "--max_steps", "2", "--learning_rate", "1e-2"]


def test_a_run_by_a_function_is_that_of_the_loss_it_copies_and_knows_its_source(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--loss", "my_losses.py:mine", "--beta", "0.3", "--output_dir", "mine"]) == 0
    assert main([*TRAIN, "--loss", "dpo", "--beta", "0.3", "--output_dir", "dpo"]) == 0
    logs = [[json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()] for name in ("mine", "dpo")]
    for own, other in zip(*logs, strict=True):
        for key in {"loss", "grad_norm", "reward_accuracy"} & other.keys():
            assert own[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7)
    assert main([*TRAIN, "--loss", "my_losses.py:mine", "--beta", "0.3", "--output_dir", "mine"]) == 0
    assert "finished already" in capsys.readouterr().err
    (folder / "my_losses.py").write_text(MINE.replace("beta *", "2 * beta *"))
    assert main([*TRAIN, "--loss", "my_losses.py:mine", "--beta", "0.3", "--output_dir", "mine"]) == 1
    assert "loss_sha256.my_losses.py:mine" in capsys.readouterr().err


def test_from_python_a_function_will_do(folder: Path) -> None:
    def shrink(ranked: Ranked, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.where(ranked.mask, ranked.logps.square(), 0).sum(1)

    told = {"max_steps": 1, "output_dir": "own", "loss_options": {"scale": 0.5}}
    done = rankalign.train("tiny", data="pairs.jsonl", loss=shrink, **told)
    assert done["steps"] == 1
    settings = json.loads(Path("own/manifest.json").read_text())["settings"]
    assert [*settings["loss_sha256"]] == [settings["loss"]]
    assert "shrink" in Path("own/README.md").read_text()


FORMAT = """
def read(row):
    if row["lang"] != "en":
        return None
    good = {"text": row["good"], "scores": {"me": row["points"]}}
    return {"prompt": row["q"], "responses": [good, {"text": row["bad"], "scores": {"me": 0}}]}


def write(record):
    return [{"q": record["prompt"], "a": answer["text"]} for answer in record["responses"]]
"""


def test_a_format_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my_format.py").write_text(FORMAT)
    rows = [{"q": f"Why {i}?", "good": "So.", "bad": "No.", "points": i + 1, "lang": "en"} for i in range(3)]
    write_rows(folder / "mine.jsonl", [*rows, {**rows[0], "lang": "fr"}])
    assert main(["convert", "mine.jsonl", "ours.jsonl", "--from", "my_format.py:read", "--to", "rankalign"]) == 0
    assert "1 rows that my_format.py:read leaves out" in capsys.readouterr().out
    ours = [json.loads(line) for line in Path("ours.jsonl").read_text().splitlines()]
    assert [r["responses"][0]["scores"]["me"] for r in ours] == [1, 2, 3]
    assert len({r["id"] for r in ours}) == 3
    assert main(["convert", "ours.jsonl", "back.jsonl", "--to", "my_format.py:write"]) == 0
    assert json.loads(Path("back.jsonl").read_text().splitlines()[1]) == {"q": "Why 0?", "a": "No."}

    write_rows(folder / "mine.jsonl", rows)
    train = ["train", "--model", "tiny", "--data", "mine.jsonl", "--format", "my_format.py:read", "--max_steps", "1"]
    assert main([*train, "--output_dir", "out"]) == 0
    assert "tokens: made" in capsys.readouterr().err
    (folder / "my_format.py").write_text(FORMAT.replace('row["good"]', 'row["good"].lower()'))
    assert main([*train, "--output_dir", "out"]) == 1
    assert "format_sha256.my_format.py:read" in capsys.readouterr().err
    assert main([*train, "--output_dir", "other"]) == 0
    assert "tokens: made" in capsys.readouterr().err  # not those of the code that was
    (folder / "my_format.py").write_text(FORMAT.replace('row["q"]', 'row["question"]'))
    assert main([*train, "--output_dir", "third"]) == 1
    assert "mine.jsonl:1: format my_format.py:read raised KeyError: 'question'" in capsys.readouterr().err


ENGINE = """
from rankalign.data.records import Response


class Echo:
    def __init__(self, policy):
        self.policy = policy

    def batches(self, prompts):
        return [[i] for i in range(len(prompts))]

    def generate(self, prompts):
        return [[Response(str(p.prompt)[::-1], policy=self.policy.name)] * self.policy.sampling.n for p in prompts]


class Length:
    def __init__(self, name, unit: int = 1):
        self.name, self.unit = name, unit

    def score(self, sets):
        return [[len(r.text) / self.unit for r in s.responses] for s in sets]
"""


def test_an_engine_and_a_scorer_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(ENGINE)
    write_rows(folder / "prompts.jsonl", [{"id": "a", "prompt": "abc"}, {"id": "b", "prompt": "de"}])
    words = ["sample", "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--model", "x", "--engine", "mine.py:Echo"]
    assert main(words) == 0
    texts = [json.loads(line)["responses"][0]["text"] for line in Path("c.jsonl").read_text().splitlines()]
    assert texts == ["cba", "ed"]
    (folder / "score.yaml").write_text("scorers: [{name: long, kind: 'mine.py:Length', unit: 2}]\n")
    score = ["score", "--config", "score.yaml", "--input", "c.jsonl", "--output", "s.jsonl"]
    assert main(score) == 0
    rows = [json.loads(line)["responses"][0]["scores"] for line in Path("s.jsonl").read_text().splitlines()]
    assert rows == [{"long": 1.5}, {"long": 1.0}]
    capsys.readouterr()
    (folder / "mine.py").write_text(ENGINE.replace("[::-1]", "[:1]"))
    for again in (words, score):
        assert main(again) == 1
        assert "was made with other settings" in capsys.readouterr().err
    (folder / "mine.py").write_text(ENGINE.replace("p.prompt", "p.promt"))
    assert main([word.replace("c.jsonl", "d.jsonl") for word in words]) == 1
    assert "engine mine.py:Echo raised AttributeError" in capsys.readouterr().err


def test_names_of_trl_for_attention_and_type_parse() -> None:
    config, notes = parse(None, ["--model", "tiny", "--torch_dtype", "bfloat16", "--attn_implementation", "sdpa"])
    assert config.dtype == "bfloat16"
    assert any("--attn_implementation" in note for note in notes)
    assert parse(None, ["--attn_implementation", "flash_attention_3"])[0].flash_attention == "fa3"
    with pytest.raises(InputError, match="unknown --dtype 'float64'"):
        parse(None, ["--torch_dtype", "float64"])


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--dataset_name D --loss_type sigmoid", {"data": "D", "loss": "dpo"}),  # TRL
        ("--lora_rank 4 --use_peft True --cutoff_len 99", {"lora_r": 4, "max_length": 99}),  # LLaMA-Factory
        ("--sequence_len 77 --base_model tiny", {"max_length": 77, "model": "tiny"}),  # axolotl
        ("--simpo_gamma 0.4 --loss simpo", {"loss_options": '{"gamma": 0.4}'}),
    ],
)
def test_names_of_other_trainers_parse(words: str, settings: dict[str, object]) -> None:
    config, notes = parse(None, words.split())
    assert {name: getattr(config, name) for name in settings} == settings
    assert notes


def test_what_another_trainer_has_and_nothing_here_needs_is_said() -> None:
    assert any("tree rows" in note for note in parse(None, ["--padding_free", "True"])[1])
