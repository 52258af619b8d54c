"""Learning rates where nobody gives one: by loss, method and adapter, as docs/losses.md has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankalign.errors import InputError
from rankalign.losses import LOSSES
from rankalign.models import load as models
from rankalign.training.arguments import parse, parse_settings
from rankalign.training.defaults import RATES, learning_rate, say
from rankalign.training.run import train
from tests.e2e.distributed import settings as run_settings
from tests.e2e.distributed import write_data

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")


def settings(tmp_path: Path, **more: Any) -> Any:
    return parse_settings({"model": "tiny", "data": "x.jsonl", "output_dir": str(tmp_path), **more})


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        ({}, 2e-5),  # RRHF, 4.1
        ({"loss": "dpo"}, 1e-6),  # DPO, appendix B
        ({"loss": "dpo", "use_lora": True}, 1e-5),
        ({"loss": "sppo"}, 5e-7),  # SPPO, 5.1
        ({"loss": "orpo"}, 8e-6),  # ORPO, appendix C
        ({"loss": "grpo"}, 1e-6),  # DeepSeekMath, 4.2
        ({"method": "sft"}, 2e-5),  # Alpaca
        ({"method": "sft", "use_lora": True}, 2e-4),  # QLoRA, table 9
        ({"method": "reward"}, 1e-5),  # Llama 2, 3.2.2
        ({"method": "reward", "use_lora": True}, 1e-4),
        ({"loss": "dpo+0.2*sft"}, 1e-6),  # the smallest: the larger one would drive pairs apart
        ({"loss": "dpo", "learning_rate": 3e-5}, 3e-5),
        ({"method": "ppo", "reward": "tiny-rm"}, 1e-5),
    ],
)
def test_a_rate_nobody_gave_is_that_of_loss_and_method(more: dict[str, Any], rate: float, tmp_path: Path) -> None:
    made = settings(tmp_path, **more)
    assert made.learning_rate == rate
    assert made.own_settings()["learning_rate"] == rate


def test_flag_and_file_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: tiny\ndata: x.jsonl\nloss: dpo\nlearning_rate: 3.0e-5\n")
    assert parse(str(path), [])[0].learning_rate == 3e-5
    flagged = parse(str(path), ["--learning_rate", "1e-4"])[0]
    assert (flagged.learning_rate, flagged.chosen) == (1e-4, [])


def test_what_was_chosen_is_said_with_its_reason(tmp_path: Path, capsys: Any) -> None:
    say(settings(tmp_path, loss="dpo", use_lora=True))
    assert capsys.readouterr().err.splitlines()[1:] == ["  learning_rate 1e-05 (dpo, LoRA)"]
    say(settings(tmp_path, learning_rate=1e-3))
    assert capsys.readouterr().err == ""


def test_the_page_names_the_rate_of_every_loss() -> None:
    table = PAGE.split("## Learning rates")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    told = {name: row[1:3] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    rest = told.pop("any_other")
    for name in LOSSES:
        full, lora = told.get(name, rest)
        assert float(full) == learning_rate("rank", name, False).value
        assert float(lora) == learning_rate("rank", name, True).value
    assert set(told) == set(RATES) | {"reward"}
    assert [float(rate) for rate in told["reward"]] == [
        learning_rate("reward", "bradley_terry", lora).value for lora in (False, True)
    ]


def test_weights_in_bfloat16_without_compensation_are_warned_of(tmp_path: Path, capsys: Any) -> None:
    given: dict[str, Any] = {"learning_rate": 1e-3, "dtype": "bfloat16"}
    say(settings(tmp_path, **given))
    assert "--optim stable_adamw keeps them" in capsys.readouterr().err
    say(settings(tmp_path, **given, use_lora=True))
    assert capsys.readouterr().err == ""
    pytest.importorskip("optimi")
    say(settings(tmp_path, **given, optim="stable_adamw"))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="kahan_sum: it is on"):
        settings(tmp_path, **given, optim="stable_adamw", optim_args="kahan_sum=False")


def test_bfloat16_weights_go_as_far_as_float32_ones_only_where_losses_are_kept(tmp_path: Path) -> None:
    """Forty updates far below the spacing of 16-bit numbers. What float32 weights learned is the measure: how far, and
    which way; weights that are saved in 16 bits cannot end just there."""
    pytest.importorskip("optimi")
    data = write_data(tmp_path / "data.jsonl")
    model = models.load_policy("tiny", dtype="float32")
    start = {name: weight.detach() for name, weight in model.named_parameters()}

    def moved(name: str, **more: Any) -> torch.Tensor:
        told = {"loss": "rrhf", "save_strategy": "no", "keep_float32": True, "use_cpu": True, "learning_rate": 1e-5}
        told |= {"max_steps": 40, "lr_scheduler_type": "constant", "warmup_steps": 0, **more}
        train(parse_settings(run_settings(data, tmp_path / name, **told)))
        (file,) = (tmp_path / name).glob("*.safetensors")
        kind = torch.bfloat16 if more.get("dtype") == "bfloat16" else torch.float32
        return torch.cat([(w.float() - start[key].to(kind).float()).flatten() for key, w in load_file(file).items()])

    whole, lost = moved("float32"), moved("bfloat16", dtype="bfloat16")
    kept = moved("kahan", dtype="bfloat16", optim="stable_adamw")
    far = [float(some.norm() / whole.norm()) for some in (lost, kept)]
    along = [float(some @ whole / (some.norm() * whole.norm())) for some in (lost, kept)]
    assert far[0] < 0.3
    assert along[0] < 0.3
    assert far[1] == pytest.approx(1.0, abs=0.15)
    assert along[1] > 0.7
