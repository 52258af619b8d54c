"""At the start of a run policy and reference are one model: every loss with a reference has a closed form there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rankalign.data.encode import EncodeOptions, TokenList, encode_all
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.training.arguments import parse_settings
from rankalign.training.examples import Example
from rankalign.training.inputs import load_data, references_of
from rankalign.training.rank import RankTrainer
from rankalign.training.run import train

LN2 = math.log(2)
EPS = 1e-3
ONE = 1 / (1 + math.exp(-1))
VALUE = 0.5 * math.log((math.exp(2) + 1) / 2)
# Of a pair whose log-ratios are both 0, from each paper's formula.
AT_THE_START = {
    "dpo": LN2,
    "sigmoid_norm": LN2,
    "ipo": (1 / (2 * 0.1)) ** 2,
    "robust": LN2,
    "hinge": 1.0,
    "exo": 0.5 * math.log(0.5 / (1 - EPS)) + 0.5 * math.log(0.5 / EPS),
    "sppo": 2 * (1 / (2 * 0.001)) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "bco": 2 * LN2,
    "discopop": 0.5 * LN2 + 0.5,
    "aot": LN2,
    "aot_unpaired": LN2,
    "kto": 0.5,
    "plackett_luce": LN2,
    "lambdaloss": (1 - 1 / math.log2(3)) * LN2,
    "nca": 2 * LN2,
    **dict.fromkeys(("odpo", "dpop", "dpo_shift", "mappo", "chi_po", "dr_dpo", "beta_dpo"), LN2),
    **dict.fromkeys(("ld_dpo", "sampo", "gamma_dpo", "tdpo1", "tdpo2"), LN2),
    **dict.fromkeys(("softmax_dpo", "infonca", "swepo", "point_sigmoid"), LN2),
    "focal_dpo": 0.5**0.05 * LN2,
    "rebel": 1.0,
    "reward_rpo": ONE * math.log(2 * ONE) + (1 - ONE) * math.log(2 * (1 - ONE)),
    "cal_dpo": LN2 + 2 * (1 / (2 * 0.001)) ** 2,
    "a_star_po": ((1 - VALUE) ** 2 + VALUE**2) / 2,
    "point_mse": 0.5,
    "approx_ndcg": 1 - 1 / math.log2(2.5),
    **dict.fromkeys(("neural_ndcg", "diff_ndcg"), 1 - (0.5 + 0.5 / math.log2(3))),
    "exo_list": 0.5 * math.log(0.5 / ONE) + 0.5 * math.log(0.5 / (1 - ONE)),
    "rloo_clipped": 0.0,
    "gspo": 0.0,
}
# Those that read the policy's level or lengths, from (log-prob, length) of the winner and of the loser.
FROM_THE_POLICY = {
    "r_dpo": lambda w, y: -math.log(1 / (1 + math.exp(-0.01 * (w[1] - y[1])))),
    "alpha_dpo": lambda w, y: math.log(1 + math.exp(0.5 - 2 * (w[0] / w[1] - y[0] / y[1]))),
    "wpo": lambda w, y: math.exp(w[0] / w[1] + y[0] / y[1]) * LN2,
    "wpo_aligned": lambda w, y: math.exp((w[0][0] - w[0][1]) / w[1] + (y[0][0] - y[0][1]) / y[1]) * LN2,
    "rloo_kl": lambda w, y: -(w[0] - y[0]) / 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))


def pairs(words: str) -> list[CandidateSet]:
    """Pairs with the ids 1, 2, ... whatever the words."""
    made = zip(words.split(), reversed(words.split()), strict=True)
    return [
        CandidateSet(str(i), f"say {a}", [Response(a, scores={"j": 1.0}), Response(f"{b} and {b}", scores={"j": 0.0})])
        for i, (a, b) in enumerate(made, start=1)
    ]


TRAIN, HELD_OUT = pairs("blue pear hello sun"), pairs("a-very-long-answer-of-its-own other dog moon")


def settings(tmp_path: Path, **more: Any) -> Any:
    fixed = {"model": "tiny", "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True}
    return parse_settings({**fixed, "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.0, **more})


def examples_of(config: Any, model: Any, layout: str, *splits: list[TokenList]) -> list[list[Example]]:
    """The lists of each split with their references, as a run puts them together."""
    together = [tokens for lists in splits for tokens in lists]
    found = references_of(config.model_settings, config.loss_settings, config.precision, model, layout, together)
    rows = iter(found)
    return [[Example(tokens, next(rows)) for tokens in lists] for lists in splits]


def test_the_table_holds_every_loss_with_a_reference() -> None:
    assert AT_THE_START.keys() | FROM_THE_POLICY.keys() == {
        name for name, loss in LOSSES.items() if loss.needs_reference and not loss.needs_own
    }


@pytest.mark.parametrize("held_out", [[], HELD_OUT])
def test_first_loss_whatever_is_held_out(tmp_path: Path, held_out: list[CandidateSet]) -> None:
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model()
    splits = [encode_all(sets, tokenizer, EncodeOptions(judge="j"))[0] for sets in (TRAIN, held_out)]
    for name in [*AT_THE_START, *FROM_THE_POLICY]:
        config = settings(tmp_path, loss=name)
        for examples in examples_of(config, model, "auto", *splits):
            if examples:
                trainer = RankTrainer(model, config, examples)
                loss = trainer.compute_loss(model, {"examples": examples})
                expected = AT_THE_START.get(name)
                if expected is None:
                    logps = trainer.values(model, examples).tolist()
                    lengths = [map(len, e.tokens.responses) for e in examples]
                    rows = [zip(*both, strict=True) for both in zip(logps, lengths, strict=True)]
                    expected = sum(FROM_THE_POLICY[name](*row) for row in rows) / len(rows)
                assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("ids", ["the same", "from equal file names"])
def test_a_run_with_held_out_lists_of_the_same_ids(tmp_path: Path, ids: str) -> None:
    places = [tmp_path / "train" / "pairs.jsonl", tmp_path / "test" / "pairs.jsonl"]
    for path, sets in zip(places, (TRAIN, HELD_OUT), strict=True):
        path.parent.mkdir()
        if ids == "the same":
            write(path, sets)
        else:
            rows = [{"prompt": s.prompt, "chosen": s.responses[0].text, "rejected": s.responses[1].text} for s in sets]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    train(settings(tmp_path, loss="dpo", data=str(places[0]), eval_data=str(places[1]), **more))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(LN2, rel=1e-6)
    assert next(line for line in lines if "eval_loss" in line)["eval_loss"] == pytest.approx(LN2, rel=1e-6)


THUMBS = [("blue", 1), ("seven", 0), ("hello", 1), ("moon", 0), ("sun", 1)]


@pytest.mark.parametrize(("loss", "expected"), [("kto", 0.5), ("bco", LN2)])
@pytest.mark.parametrize("rows", [THUMBS, [row for row in THUMBS if row[1]]])
def test_thumbs_on_single_answers_train(
    tmp_path: Path, loss: str, expected: float, rows: list[tuple[str, int]]
) -> None:
    path = tmp_path / "thumbs.jsonl"
    lines = [{"prompt": f"say {word}", "completion": word, "label": bool(up)} for word, up in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = {"data": str(path), "eval_data": str(path), "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 0.01}
    settings_ = settings(tmp_path, loss=loss, loss_options={"threshold": 0.5}, max_steps=4, beta=1.0, **more)
    train(settings_)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert next(line for line in log if "eval_loss" in line)["eval_loss"] < expected - 0.01


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"sft", "raft"}))
def test_losses_that_only_rank_refuse_data_without_a_pair(tmp_path: Path, loss: str) -> None:
    path = tmp_path / "thumbs.jsonl"
    write(
        path, [CandidateSet(str(i), "say", [Response(w, scores={"j": float(up)})]) for i, (w, up) in enumerate(THUMBS)]
    )
    advice = loss if loss in ("kto", "bco") else "kto"
    config = settings(tmp_path, loss=loss, data=str(path))
    with pytest.raises(InputError, match=f"nothing to rank; --loss {advice} --loss_options .*threshold"):
        load_data(config.data_settings, config.loss_settings, tiny.build_tokenizer())


def test_lists_of_one_id_are_refused(tmp_path: Path) -> None:
    lists = encode_all([*TRAIN, *HELD_OUT], tiny.build_tokenizer(), EncodeOptions(judge="j"))[0]
    with pytest.raises(InputError, match="2 training lists have the id '1'"):
        RankTrainer(tiny.build_model(), settings(tmp_path), [Example(tokens) for tokens in lists])


def test_a_response_of_several_files_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")
    lists = encode_all(TRAIN, tiny.build_tokenizer(), EncodeOptions(judge="j"))[0]
    config, model = settings(tmp_path, loss="dpo"), tiny.build_model()
    examples_of(config, model, "auto", lists[:3], lists)
    assert "reference: 8 responses computed, 0 from" in capsys.readouterr().err
    examples_of(config, model, "auto", lists)
    assert "reference: 0 responses computed, 8 stored ones computed again as a check, 8 from" in capsys.readouterr().err
